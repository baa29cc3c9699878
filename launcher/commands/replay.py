"""``esper replay``: make a recorded decision again."""

from __future__ import annotations

import click

from launcher.commands.installation import data_dir_option, installation


@click.command("replay")
@click.argument("decision")
@data_dir_option
def replay_command(decision: str) -> None:
    """Decide again on the stored input of DECISION, and print the result.

    DECISION is an adaptation (A-17 or its uid), or the uid of a recorded decision. The exit status
    is 1 if the result is not the recorded decision.
    """
    with installation():
        from apps.adaptations.services import describe, find_decision, replay_decision
        from esper.exceptions import CodecError, ConfigurationError

        try:
            replayed = replay_decision(find_decision(decision))
        except (CodecError, ConfigurationError) as error:
            raise click.ClickException(f"This decision cannot be replayed: {error}.") from error
        click.echo(describe(replayed))
        if replayed.differences:
            raise SystemExit(1)
