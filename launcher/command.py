"""The command line of ``esper``. Each command parses its options and calls one function."""

from __future__ import annotations

from pathlib import Path

import click

import esper

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where data is kept. Default: ESPER_DATA_DIR, else var in a clone, else the user data "
    "directory of this platform.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Esper watches neural networks train and changes their architecture while they do."""


@cli.command("up")
@click.option("--setup", is_flag=True, help="Prepare everything, then stop.")
@click.option("--no-demo", is_flag=True, help="Start no demo trainers.")
@click.option("--port", type=int, metavar="N", help="The web port; 0: any free one. Default: 8080.")
@data_dir_option
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

    chosen = data_dir.expanduser().resolve() if data_dir else None
    if smoke:
        raise SystemExit(run.main(chosen))
    options = Options(
        data_dir=chosen or default_data_dir(),
        port=port,
        demos=() if no_demo else plan.DEMOS,
        setup_only=setup,
    )
    raise SystemExit(up(options))


@cli.command()
def version() -> None:
    """Print the version of Esper."""
    click.echo(esper.__version__)


def main() -> None:
    """The entry point of the installed command."""
    cli(prog_name="esper")
