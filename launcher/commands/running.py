"""``esper pause``, ``resume``, ``stop`` and ``kill``: acts on runs, and on all of them."""

from __future__ import annotations

import click

from launcher.commands.asking import asks_server, json_option
from launcher.commands.deciding import dry_run_option, reason_option
from launcher.commands.finding import run_uid
from launcher.commands.waiting import timeout_option, wait_for_command, wait_option
from launcher.remote.client import Client, segment
from launcher.remote.tables import print_json


def _act(name: str, path: str, text: str, done: str) -> click.Command:
    @click.command(name, help=text)
    @click.argument("run")
    @reason_option
    @dry_run_option
    @wait_option
    @timeout_option
    @json_option
    @asks_server
    def command(
        client: Client,
        run: str,
        reason: str,
        dry_run: bool,
        wait: bool,
        timeout: float,
        as_json: bool,
    ) -> None:
        uid = run_uid(client, run)
        found = client.act(f"runs/{uid}/{path}", {"reason": reason}, dry_run=dry_run).data
        if wait and not dry_run:
            wait_for_command(client, uid, found["command_seq"], timeout=timeout)
        if as_json:
            print_json(found)
        else:
            asked = "could be asked" if dry_run else "was asked" if not wait else "has acknowledged"
            click.echo(f"The trainer of {found['name']} (R-{found['number']}) {asked} to {done}.")

    return command


pause_command = _act(
    "pause",
    "pause-adaptation",
    "Pause adaptation of RUN (R-3, its uid or its name); training goes on.",
    "pause adaptation",
)
resume_command = _act(
    "resume", "resume-adaptation", "Resume adaptation of RUN.", "resume adaptation"
)
stop_command = _act("stop", "stop", "End RUN at its next step.", "stop at its next step")


@click.command("kill")
@click.option("--off", "allow", is_flag=True, help="Switch adaptation on again.")
@click.option("--project", help="Only of the runs of this project (prj_…).")
@reason_option
@dry_run_option
@json_option
@asks_server
def kill_command(
    client: Client, allow: bool, project: str | None, reason: str, dry_run: bool, as_json: bool
) -> None:
    """Stop all adaptation of all runs at once; training goes on everywhere. It needs no reason."""
    body = {"on": allow, "reason": reason}
    path = f"projects/{segment(project)}/adaptation-switch" if project else "adaptation-switch"
    switch = client.act(path, body, dry_run=dry_run).data
    if as_json:
        print_json(switch)
        return
    word = "would be" if dry_run else "is"
    where = f"in project {project}" if project else "everywhere"
    click.echo(f"Adaptation {word} {'on' if switch['on'] else f'switched off {where}'}.")


COMMANDS: tuple[click.Command, ...] = (pause_command, resume_command, stop_command, kill_command)
