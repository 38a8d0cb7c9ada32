"""What every command of citadelctl shares: its options, its outputs, and how failures end it.

Nothing here imports httpx or rich: `--help` and shell completion must be instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from citadel_supervisor.conf.paths import control_socket
from citadel_supervisor.errors import ControlError

if TYPE_CHECKING:
    from citadel_supervisor.control.client import ControlClient

INTERRUPTED = 130
"""128 plus SIGINT."""
PIPE_CLOSED = 141
"""128 plus SIGPIPE."""

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """The options of this run of citadelctl."""

    socket: str | None = None
    as_json: bool = False

    def client(self, timeout_s: float = 10.0) -> ControlClient:
        from citadel_supervisor.control.client import ControlClient

        return ControlClient(control_socket(self.socket), timeout_s)


def json_option(command: CommandT) -> CommandT:
    """`--json`, accepted before the command and after it."""

    def note(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(Session).as_json = True

    return click.option(
        "--json", is_flag=True, expose_value=False, callback=note, help="Write JSON, for programs."
    )(command)


def timeout_option(default: float | None) -> Callable[[CommandT], CommandT]:
    text = "Give up after S seconds (exit code 6)" + ("; default: never." if default is None else ".")
    return click.option(
        "--timeout",
        "timeout_s",
        metavar="S",
        type=click.FloatRange(min=0, min_open=True),
        default=default,
        show_default=default is not None,
        help=text,
    )


def colourful(stream: TextIO) -> bool:
    """Whether colour belongs on `stream`: a terminal that can show it, and no NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def write_json_line(data: object) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))


def error_json(error: ControlError) -> dict[str, str]:
    return {"message": str(error), "code": error.code.name.lower()}


class Root(click.Group):
    """The top command: turns failures into one line, or into JSON, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except ControlError as error:
            report(ctx.ensure_object(Session), error)
            raise SystemExit(error.code) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            _end_quietly()


def report(session: Session, error: ControlError) -> None:
    """Tell a failure: on standard error, or with --json as an object on standard output."""
    if session.as_json:
        write_json({"error": error_json(error)})
    else:
        click.echo(f"citadelctl: {printable(str(error))}", err=True)


def _end_quietly() -> NoReturn:
    """The reader of our output has gone: nothing to say, and nobody to say it to."""
    # Python flushes standard output once more on its way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(PIPE_CLOSED)


_SPELLED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without the power to command a terminal: control characters but newline and tab are spelled."""
    return text.translate(_SPELLED)
