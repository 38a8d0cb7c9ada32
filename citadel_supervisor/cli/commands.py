"""citadelctl's commands. Each is short: it asks the client, and hands what it gets to the renderer."""

from __future__ import annotations

import codecs
import shutil
import sys
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from citadel_supervisor import __version__
from citadel_supervisor.cli.lifecycle import ALL, command_models
from citadel_supervisor.cli.session import (
    Root,
    Session,
    colourful,
    error_json,
    json_option,
    printable,
    report,
    timeout_option,
    write_json,
    write_json_line,
)
from citadel_supervisor.errors import ControlError, CtlExit, DaemonUnreachable

if TYPE_CHECKING:
    from citadel_supervisor.control.client import ControlClient

EXIT_CODES = f"""\b
Exit codes:
  {CtlExit.OK:3}  done
  {CtlExit.FAILED:3}  the supervisor tried and it did not work; the reason is shown
  {CtlExit.USAGE:3}  wrong usage
  {CtlExit.UNREACHABLE:3}  no supervisor answers on the control socket
  {CtlExit.UNKNOWN_MODEL:3}  no such model; nothing was done
  {CtlExit.REFUSED:3}  not permitted, or the command makes no sense now
  {CtlExit.TIMED_OUT:3}  not done within --timeout; what was asked for goes on
  130  interrupted; what was asked for goes on
"""

COMPLETION = """\b
Shell completion, also of model names (bash; zsh_source and fish_source for those shells):
  eval "$(_CITADELCTL_COMPLETE=bash_source citadelctl)"
"""


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{EXIT_CODES}\n{COMPLETION}",
)
@click.option(
    "--socket", metavar="PATH", envvar="CITADEL_SOCKET", show_envvar=True, help="The control socket."
)
@json_option
@click.version_option(__version__, prog_name="citadelctl")
@click.pass_context
def cli(context: click.Context, socket: str | None) -> None:
    """Look at and command a running citadel-supervisor.

    \b
    Examples:
      citadelctl status                      what runs, since when, with what
      citadelctl status phi-3-mini           everything about one model
      citadelctl restart phi-3-mini          and wait until it is ready again
      citadelctl stop all --drain 5          give requests in flight 5 s to finish
      citadelctl logs -f -n 50 hermes-2      its log, and what is added to it
      citadelctl --json status | jq '.models[].state'

    The control socket is $CITADEL_SOCKET or --socket; by default /run/citadel/control.sock for root, else
    citadel/control.sock under $XDG_RUNTIME_DIR, else under the state directory. $NO_COLOR switches
    colour off; there is none where output is piped.
    """
    context.ensure_object(Session).socket = socket


def main() -> None:
    """The entry point of citadelctl."""
    cli(prog_name="citadelctl")


def _complete_model(context: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """The daemon's models that begin with `word`; none where it does not answer at once."""
    socket = context.find_root().params.get("socket")
    try:
        with Session(socket).client(timeout_s=1.0) as client:
            names = list(client.status()["models"])
    except ControlError:
        return []
    if parameter.name == "models" and context.info_name != "drain":
        names.append(ALL)
    return [CompletionItem(name) for name in names if name.startswith(word)]


@cli.command()
@click.argument("model", required=False, shell_complete=_complete_model)
@timeout_option(10.0)
@json_option
@click.pass_obj
def status(session: Session, model: str | None, timeout_s: float) -> None:
    """Show all models, or everything about one.

    Exits with 0 whenever the supervisor answers, ready or not: `ready` in --json says which.
    """
    with session.client(timeout_s) as client:
        data = client.status() if model is None else client.model(model)
    if session.as_json:
        write_json(data)
        return
    from citadel_supervisor.cli import render

    show = render.status_table if model is None else render.model_details
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else render.PIPED_WIDTH
    text = show(data, width=width, colour=colourful(sys.stdout), now=datetime.now(UTC))
    click.echo(text, color=colourful(sys.stdout))


MODELS = click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=_complete_model)
NO_WAIT = click.option("--no-wait", is_flag=True, help="Return at once; do not wait until it has settled.")
DRAIN = click.option(
    "--drain",
    "drain_s",
    metavar="S",
    type=click.FloatRange(min=0, max=86_400),
    help="Seconds for requests in flight to finish; default: as configured.",
)


@cli.command()
@MODELS
@NO_WAIT
@timeout_option(None)
@json_option
@click.pass_obj
def start(session: Session, models: tuple[str, ...], no_wait: bool, timeout_s: float | None) -> None:
    """Start models and wait until they are ready. 'all' means every configured one.

    Starting a model that drains makes it take requests again; starting a quarantined one gives it a
    new restart budget.
    """
    command_models(session, "start", models, no_wait, timeout_s, {})


@cli.command()
@MODELS
@DRAIN
@NO_WAIT
@timeout_option(None)
@json_option
@click.pass_obj
def stop(
    session: Session, models: tuple[str, ...], drain_s: float | None, no_wait: bool, timeout_s: float | None
) -> None:
    """Let requests in flight finish, then end the engines. 'all' means every model."""
    command_models(session, "stop", models, no_wait, timeout_s, {"drain_s": drain_s})


@cli.command()
@MODELS
@DRAIN
@NO_WAIT
@timeout_option(None)
@json_option
@click.pass_obj
def restart(
    session: Session, models: tuple[str, ...], drain_s: float | None, no_wait: bool, timeout_s: float | None
) -> None:
    """Give models a new engine and wait until they are ready.

    Several are restarted one after the other, so that the others keep serving, and the first that does
    not come back ends it; with --no-wait all at once. 'all' leaves out those that are stopped.
    """
    command_models(session, "restart", models, no_wait, timeout_s, {"drain_s": drain_s})


@cli.command()
@MODELS
@NO_WAIT
@timeout_option(None)
@json_option
@click.pass_obj
def drain(session: Session, models: tuple[str, ...], no_wait: bool, timeout_s: float | None) -> None:
    """Finish what runs and take nothing new; the engine stays loaded until start or stop."""
    if ALL in models:
        raise click.UsageError("'all' is for start, stop and restart; name the models to drain")
    command_models(session, "drain", models, no_wait, timeout_s, {})


@cli.command()
@timeout_option(60.0)
@json_option
@click.pass_obj
def reload(session: Session, timeout_s: float) -> None:
    """Read the configuration again and apply what changed.

    It is validated whole before anything is applied: with an error in it, nothing changes. Models whose
    settings did not change keep serving.
    """
    from citadel_supervisor.cli.waiting import run_all

    with session.client() as client:
        outcome = run_all({"": partial(client.reload, timeout_s=timeout_s)}, client.status, "reloading")
    for error in outcome.failed.values():
        raise error
    result = outcome.done[""]
    if session.as_json:
        write_json(result)
        return
    for key, label in (
        ("changed", "changed"),
        ("unchanged", "unchanged"),
        ("restart_needed", "needs a restart"),
    ):
        if result[key]:
            click.echo(printable(f"{label}: {', '.join(result[key])}"))


@cli.command()
@click.argument("model", shell_complete=_complete_model)
@click.option(
    "-f", "--follow", is_flag=True, help="Go on with what is added, through rotation, until Ctrl-C."
)
@click.option(
    "-n",
    "--lines",
    default=100,
    show_default=True,
    type=click.IntRange(0, 100_000),
    help="Lines to begin with.",
)
@json_option
@click.pass_obj
def logs(session: Session, model: str, follow: bool, lines: int) -> None:
    """Show the log of MODEL, or of 'supervisor' or 'zygote'.

    With --json, an object a line: {"model", "line"}.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    rest = ""
    with session.client() as client:
        for chunk in client.logs(model, lines=lines, follow=follow):
            text = decode(chunk)
            if not session.as_json:
                shown = printable(text.replace("\r", "\n")) if sys.stdout.isatty() else text
                click.echo(shown, nl=False, color=True)
                continue
            *whole, rest = (rest + text).split("\n")
            for line in whole:
                write_json_line({"model": model, "line": line})
        if rest:
            write_json_line({"model": model, "line": rest})
        if follow:
            raise _ended(client)


@cli.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with those to come, until Ctrl-C.")
@json_option
@click.pass_obj
def events(session: Session, follow: bool) -> None:
    """Show what happened: transitions, exits, commands, notices. With --json, an object a line."""
    colour = colourful(sys.stdout)
    with session.client() as client:
        for event in client.events(follow=follow):
            if session.as_json:
                write_json_line(event)
                continue
            from citadel_supervisor.cli.render import event_line

            click.echo(event_line(event, colour=colour), color=colour)
        if follow:
            raise _ended(client)


def _ended(client: ControlClient) -> DaemonUnreachable:
    return DaemonUnreachable(str(client.socket), "it stopped and ended the stream")


@cli.command()
@timeout_option(10.0)
@json_option
@click.pass_obj
def version(session: Session, timeout_s: float) -> None:
    """Show the version of citadelctl and of the supervisor."""
    problem: ControlError | None = None
    daemon: dict[str, Any] | None = None
    try:
        with session.client(timeout_s) as client:
            daemon = client.version()
    except ControlError as error:
        problem = error
    if session.as_json:
        write_json(
            {"citadelctl": __version__, "supervisor": daemon}
            | ({"error": error_json(problem)} if problem else {})
        )
    else:
        click.echo(f"citadelctl {__version__}")
        if daemon is not None:
            click.echo(printable(f"citadel-supervisor {daemon['version']} (pid {daemon['pid']})"))
    if problem is not None:
        if not session.as_json:
            report(session, problem)
        raise SystemExit(problem.code)
