"""The command line of ``esper``. Each command parses its options and calls one function."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

import esper
from launcher.commands import deciding, maintaining, reading, remedying, running
from launcher.commands.audit import audit_group
from launcher.commands.backup import backup_command, restore_command, restored_command
from launcher.commands.branching import branch_command
from launcher.commands.channels import channels_group
from launcher.commands.delegating import delegations_group
from launcher.commands.duty import duty_group
from launcher.commands.freezing import freeze_group
from launcher.commands.installation import data_dir_option
from launcher.commands.keys import rotate_command
from launcher.commands.mcp import mcp_command
from launcher.commands.people import people_group
from launcher.commands.planning import plans_group
from launcher.commands.projects import projects_group
from launcher.commands.recipes import recipe_group
from launcher.commands.replay import replay_command
from launcher.commands.sections import SectionedGroup
from launcher.commands.tokens import token_group
from launcher.commands.watching import watch_command


@click.group(
    cls=SectionedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def cli() -> None:
    """Esper watches neural networks while they train, says what is wrong, and repairs it.

    A run, an adaptation or a violation is named by its number (R-3, A-17, V-88) or its uid, a run
    also by its name. esper COMMAND --help explains one command.
    """


@cli.command("up")
@click.option("--setup", is_flag=True, help="Prepare everything, then stop.")
@click.option("--no-demo", is_flag=True, help="Start no demo trainers.")
@click.option("--port", type=int, metavar="N", help="The web port; 0: any free one. Default: 8080.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where data is kept. Default: ESPER_DATA_DIR, else var in a clone, else the user data "
    "directory of this platform.",
)
@click.option(
    "--smoke",
    is_flag=True,
    help="Run one adaptation end to end, in a temporary directory unless --data-dir is given. "
    "Print a report as JSON, then stop.",
)
def up_command(
    setup: bool, no_demo: bool, port: int | None, data_dir: Path | None, smoke: bool
) -> None:
    """Start Esper on this machine. Ctrl-C stops all of it."""
    from hosts.paths import default_data_dir
    from launcher.smoke import run
    from launcher.supervisor import plan
    from launcher.supervisor.esper import Options
    from launcher.up import up

    chosen = _make(data_dir.expanduser().resolve()) if data_dir else None
    if smoke:
        raise SystemExit(run.main(chosen))
    options = Options(
        data_dir=chosen or _make(default_data_dir()),
        port=port,
        demos=() if no_demo else plan.DEMOS,
        setup_only=setup,
    )
    raise SystemExit(up(options))


def _make(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise click.ClickException(
            f"{directory} cannot be used: {error.strerror}. Choose another with --data-dir."
        ) from error
    return directory


@cli.command()
@data_dir_option
def doctor() -> None:
    """Say what this machine lacks. The exit status is 1 if something required is missing."""
    from hosts.paths import default_data_dir
    from launcher.doctor import Result, examine

    missing = 0
    for finding in examine(default_data_dir()):
        missing += finding.result is Result.MISSING
        click.echo(f"{finding.result:<8} {finding.name:<14} {finding.text}")
    if missing:
        raise click.ClickException(f"{missing} required things are missing.")
    click.echo("Esper can run here. Start it with esper up.")


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def manage(arguments: tuple[str, ...]) -> None:
    """Run a command of Django, such as migrate or createsuperuser."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
    from django.core.management import execute_from_command_line

    execute_from_command_line(["esper manage", *arguments])


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL: eval "$(esper completion bash)"."""
    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"There is no completion for {shell}.")
    click.echo(found(cli, {}, "esper", "_ESPER_COMPLETE").source())


@cli.command()
def version() -> None:
    """Print the version of Esper."""
    click.echo(esper.__version__)


cli.add_command(token_group)
cli.add_command(recipe_group)
cli.add_command(branch_command)
cli.add_command(audit_group)
cli.add_command(backup_command)
cli.add_command(restore_command)
cli.add_command(restored_command)
cli.add_command(rotate_command)
cli.add_command(replay_command)
cli.add_command(watch_command)
cli.add_command(mcp_command)
cli.add_command(channels_group)
cli.add_command(delegations_group)
cli.add_command(plans_group)
cli.add_command(freeze_group)
cli.add_command(duty_group)
cli.add_command(people_group)
cli.add_command(projects_group)
audit_group.add_command(maintaining.audit_log_command)
for command in (
    *reading.COMMANDS,
    *deciding.COMMANDS,
    *running.COMMANDS,
    *maintaining.COMMANDS,
    *remedying.COMMANDS,
):
    cli.add_command(command)


def main() -> None:
    """The entry point of the installed command."""
    cli(prog_name="esper")
