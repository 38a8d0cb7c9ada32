"""The command `citadel-supervisor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NoReturn

import click

from citadel_supervisor import __version__
from citadel_supervisor.errors import ConfigError, DaemonExit, StartError

_CONFIG_HELP = "The configuration file. Default: $CITADEL_CONFIG, else /etc/citadel/citadel.yaml."
_EXIT_CODES = """\b
Exit codes:
  0   fine
  1   a bug; the log has the stack trace
  2   the command line is wrong
  71  a port or the runtime directory belongs to another process
  78  the configuration was refused, or `check` found problems"""


_config_option = click.option(
    "--config", "-c", type=click.Path(path_type=Path), metavar="FILE", help=_CONFIG_HELP
)
"""Taken before the command and after it; after it counts."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"""\b
Examples:
  citadel-supervisor --config etc/demo.yaml check
  citadel-supervisor --config etc/demo.yaml run
  CITADEL_GATEWAY__ROUTER_PORT=9000 citadel-supervisor --config etc/demo.yaml run
  citadel-supervisor schema --table

{_EXIT_CODES}""",
)
@_config_option
@click.pass_context
def main(context: click.Context, config: Path | None) -> None:
    """Supervises vLLM workers, one for each configured model, and serves them as one OpenAI-compatible API.

    Every setting of the file can be overridden by an environment variable: CITADEL_SECTION__KEY, and for a
    model CITADEL_MODELS__PHI_3_MINI__CORES. `check` shows which are in force.

    While it runs, talk to it with `citadelctl`.
    """
    context.obj = config


@main.command()
@_config_option
@click.pass_obj
def run(outer: Path | None, config: Path | None) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    Ports are bound first; then the workers load. SIGTERM drains: requests in flight may finish, for
    `workers.drain_s` seconds. A second SIGTERM ends it at once.
    """
    from citadel_supervisor.config_load import load

    try:
        loaded = load(config or outer)
        # Later than the check of the configuration, which then answers at once.
        from citadel_supervisor.daemon import run as run_daemon

        status = run_daemon(loaded.settings, loaded.path)
    except ConfigError as error:
        _refuse(error)
    except StartError as error:
        click.echo(f"citadel-supervisor: {error}", err=True)
        sys.exit(DaemonExit.PORT_TAKEN)
    sys.exit(status)


@main.command()
@click.option("--json", "as_data", is_flag=True, help="Print one JSON object.")
@_config_option
@click.pass_obj
def check(outer: Path | None, config: Path | None, as_data: bool) -> None:
    """Validate the configuration and explain what would run on this host.

    Looks at the checkpoints, cores, memory and ports as well; starts and changes nothing. Exits with 0 when
    everything is fine and with 78 when there are problems, each with what to do about it.

    \b
    Examples:
      citadel-supervisor --config etc/demo.yaml check
      citadel-supervisor check --json | jq .problems
    """
    from rich.console import Console

    from citadel_supervisor.conf.check import examine
    from citadel_supervisor.conf.check_view import as_json, show
    from citadel_supervisor.conf.host import read_host
    from citadel_supervisor.config_load import load

    try:
        loaded = load(config or outer)
    except ConfigError as error:
        if not as_data:
            _refuse(error)
        problems = [_as_problem(line) for line in error.problems]
        click.echo(json.dumps({"ok": False, "config": error.source, "problems": problems}, indent=2))
        sys.exit(DaemonExit.CONFIG)
    settings = loaded.settings
    host = read_host(settings.gateway.host, list(settings.ports().values()), settings.socket)
    report = examine(loaded, host)
    if as_data:
        click.echo(json.dumps(as_json(report), indent=2))
    else:
        show(report, Console(highlight=False))
    sys.exit(DaemonExit.OK if report.ok else DaemonExit.CONFIG)


@main.command()
@click.option("--table", is_flag=True, help="Print Markdown tables of every setting instead.")
def schema(table: bool) -> None:
    """Print the JSON schema of a configuration file, for editors that complete and check YAML."""
    from citadel_supervisor.conf.reference import json_schema, settings_table

    click.echo(settings_table() if table else json_schema(), nl=False)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"citadel-supervisor {__version__}")


def _refuse(error: ConfigError) -> NoReturn:
    """Print every problem on a line of its own and exit."""
    click.echo(f"citadel-supervisor: configuration refused: {error.source}", err=True)
    for line in error.problems:
        click.echo(f"  {line}", err=True)
    sys.exit(DaemonExit.CONFIG)


def _as_problem(line: str) -> dict[str, str]:
    path, _, what = line.partition(": ")
    return {"path": path, "what": what, "todo": ""}
