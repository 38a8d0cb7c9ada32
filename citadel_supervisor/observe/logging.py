"""Log lines: the daemon's own, and what the engines print.

The daemon writes to standard error (readable, or one JSON object a line, or for the journal) and to
`supervisor.log`. What an engine prints goes, line by line, to that model's own file and, under
systemd, to the journal; a terminal is spared it. Files are rotated daily and by size.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec
from loguru import logger

from citadel_supervisor.config import LogSettings
from citadel_supervisor.errors import StartError
from citadel_supervisor.events import Event, Notice, RequestDone, Transition, WorkerExited
from citadel_supervisor.states import WorkerState
from citadel_supervisor.workers.lines import read_lines

if TYPE_CHECKING:
    from loguru import Message, Record

PRIORITY = {"DEBUG": 7, "INFO": 6, "SUCCESS": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""syslog priorities, as the journal reads them from a `<N>` in front of a line."""

ENGINE_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def set_up_logging(settings: LogSettings, directory: Path, models: list[str]) -> None:
    """Make every sink. Raises StartError when the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        logger.remove()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a line for each garbled request
        logger.add(_standard_error(settings), level=settings.level, format="{message}", filter=_for_operator)
        _add_file(
            settings, directory / "supervisor.log", lambda record: "engine" not in record["extra"], True
        )
        for name in [*models, "zygote"]:
            _add_file(settings, directory / f"{name}.log", _only(name), False)
    except OSError as error:
        raise StartError(f"cannot write logs to {directory}: {error.strerror}; set log_dir") from error


def _add_file(settings: LogSettings, path: Path, wanted: Callable[[Record], bool], json_lines: bool) -> None:
    logger.add(
        path,
        level=settings.level,
        format=_json_format if json_lines else "{message}",
        filter=wanted,
        rotation=_Rotation(settings.max_file),
        retention=f"{settings.keep_days} days",
        encoding="utf-8",
        errors="backslashreplace",
    )


def _only(name: str) -> Callable[[Record], bool]:
    return lambda record: record["extra"].get("engine") == name


def _for_operator(record: Record) -> bool:
    """Engine lines go to the journal; on a terminal they would bury everything else."""
    return "engine" not in record["extra"] or "JOURNAL_STREAM" in os.environ


class _Rotation:
    """A new file each day, and before one would grow over `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._day: datetime.date | None = None

    def __call__(self, message: Message, file: TextIO) -> bool:
        today = message.record["time"].date()
        if self._day is None:
            modified = datetime.datetime.fromtimestamp(
                os.fstat(file.fileno()).st_mtime, message.record["time"].tzinfo
            )
            self._day = modified.date() if file.tell() else today
        full = file.tell() + len(message) > self._limit
        if full or today != self._day:
            self._day = today
            return file.tell() > 0
        return False


def _standard_error(settings: LogSettings) -> Callable[[Message], None]:
    stream = sys.stderr
    if settings.json_lines:
        render = _json_line
    elif "JOURNAL_STREAM" in os.environ:
        render = _journal_line
    else:
        coloured = stream.isatty() and "NO_COLOR" not in os.environ
        render = _coloured_line if coloured else _plain_line

    def write(message: Message) -> None:
        try:
            stream.write(render(message.record) + "\n")
            stream.flush()
        except (OSError, ValueError):
            pass  # a closed terminal must not stop the daemon; the file has the line

    return write


def _json_format(record: Record) -> str:
    record["extra"]["_json"] = _json_line(record)
    return "{extra[_json]}\n"


def _json_line(record: Record) -> str:
    extra = {key: value for key, value in record["extra"].items() if not key.startswith("_")}
    data = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "message": record["message"],
        **{
            key: value if isinstance(value, int | float | bool) else str(value)
            for key, value in extra.items()
        },
    }
    if record["exception"] is not None:
        data["exception"] = repr(record["exception"].value)
        data["trace"] = "".join(traceback.format_exception(record["exception"].value))
    try:
        return msgspec.json.encode(data).decode()
    except UnicodeEncodeError:  # a file's name for instance may hold bytes that are no text
        return json.dumps(data)


def _subject(record: Record) -> str:
    extra = record["extra"]
    return str(extra.get("engine") or extra.get("model") or extra.get("part") or "supervisor")


def _flat(record: Record) -> str:
    """The message with control characters escaped: one event is one line, whatever is in it."""
    text = record["message"]
    flat = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if record["exception"] is not None:
        flat += f" ({record['exception'].value!r}; the stack trace is in supervisor.log)"
    return flat


def _journal_line(record: Record) -> str:
    return f"<{PRIORITY.get(record['level'].name, 6)}>{_subject(record)}: {_flat(record)}"


def _plain_line(record: Record) -> str:
    return f"{record['time']:%H:%M:%S} {record['level'].name:<7} {_subject(record):<14} {_flat(record)}"


def _coloured_line(record: Record) -> str:
    colour = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31", "SUCCESS": "32"}.get(
        record["level"].name, "0"
    )
    return (
        f"\x1b[2m{record['time']:%H:%M:%S}\x1b[0m \x1b[1m{_subject(record):<14}\x1b[0m "
        f"\x1b[{colour}m{_flat(record)}\x1b[0m"
    )


class EngineLines:
    """Takes in what engines print."""

    async def open(self, name: str) -> int:
        """A descriptor to write lines to, logged as the model's own; the caller closes it."""
        reading, writing = os.pipe()
        bound = logger.bind(engine=name)
        await read_lines(reading, lambda line: _log_line(bound, line), lambda: None)
        return writing


def _log_line(bound: object, line: bytes) -> None:
    text = line.decode("utf-8", "backslashreplace").rstrip()
    if not text:
        return
    head = text[:64]
    level = next((name for name in ENGINE_LEVELS if f"{name} " in head), "INFO")
    bound.log(level, "{}", text)  # type: ignore[attr-defined]


def log_event(event: Event) -> None:
    """The line for an event that has one; requests have none unless they failed on our side."""
    match event:
        case Transition(model=model, after=after, reason=reason, generation=generation):
            level = {
                WorkerState.READY: "SUCCESS",
                WorkerState.FAILED: "ERROR",
                WorkerState.QUARANTINED: "ERROR",
                WorkerState.BACKING_OFF: "WARNING",
            }.get(after, "INFO")
            text = f"{after}: {reason}" if reason else str(after)
            logger.bind(model=model, generation=generation, state=str(after)).log(level, "{}", text)
        case WorkerExited(model=model, part=part, pid=pid, status=status, expected=False):
            logger.bind(model=model, pid=pid, status=status).warning("{} {} ended unasked", part, pid)
        case RequestDone(status=status) if status >= 500:
            logger.bind(model=event.model, request_id=event.request_id, status=status).warning(
                "{} was answered with {} after {:.2f} s, attempts {}",
                event.endpoint, status, event.duration_s, event.attempts,
            )  # fmt: skip
        case Notice(level=level, text=text, model=model):
            logger.bind(**({"model": model} if model else {})).log(level, "{}", text)
        case _:
            pass
