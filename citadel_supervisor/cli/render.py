"""How citadelctl shows things to people: tables and lines, as text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from citadel_supervisor.cli.session import printable

PIPED_WIDTH = 100_000
"""Wide enough for anything: what is piped is never cut or folded."""

_STYLES = {
    "ready": "green",
    "starting": "cyan",
    "loading": "cyan",
    "verifying": "cyan",
    "draining": "yellow",
    "stopping": "yellow",
    "stopped": "dim",
    "backing_off": "red",
    "failed": "red",
    "quarantined": "bold red",
}
COLUMNS = ("MODEL", "STATE", "PORT", "PID", "GEN", "RESTARTS", "CPUS", "MEMORY", "ACTIVE", "SINCE")
_DROPPED_FIRST = ("CPUS", "PID", "GEN", "RESTARTS", "SINCE", "MEMORY")
"""What a narrow terminal does without, in this order; `status MODEL` and --json have it all."""
_NUMBERS = frozenset({"PORT", "PID", "GEN", "RESTARTS", "MEMORY", "ACTIVE"})
_GAP = 2


def duration(seconds: float) -> str:
    """Two units at most: "4.2 s", "3 min", "2 h 5 min", "3 d 4 h"."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    large, small, units = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    if large >= 24:
        large, small, units = (whole // 86400, whole % 86400 // 3600, ("d", "h"))
    return f"{large} {units[0]}" + (f" {small} {units[1]}" if small else "")


def size(count: int | None) -> str:
    """Decimal units, as the configuration writes them: "812 MB", "1.6 GB"."""
    if not count:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def cpu_ranges(cpus: Iterable[int]) -> str:
    """The kernel's way to write a set of CPUs: "0-3,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "–"


def state_text(model: dict[str, Any]) -> str:
    """A model's state in a few words, with its progress while it loads."""
    state, after = model["state"], model["ready_after_s"]
    if state == "ready":
        return "ready" if after is None else f"ready in {duration(after)}"
    text = state.replace("_", " ")
    return f"{text}: {model['progress']}" if state == "loading" and model["progress"] else text


def since_text(model: dict[str, Any], now: datetime) -> str:
    """How long the model has been in its state."""
    if not model["since"]:
        return "–"
    return duration((now - datetime.fromisoformat(model["since"])).total_seconds())


def status_table(status: dict[str, Any], *, width: int, colour: bool, now: datetime) -> str:
    """The whole in one table, at most `width` columns wide where ids and words allow it."""
    rows = {name: _row(model, now) for name, model in status["models"].items()}
    columns = _that_fit(rows.values(), width)
    # Where even those do not fit, the table is as wide as it must be: a folded id is no use.
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        wrap = column == "STATE"
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=not wrap)
    for name, row in rows.items():
        style = _STYLES.get(status["models"][name]["state"], "")
        table.add_row(*(Text(row[column], style if column == "STATE" else "") for column in columns))
    least = _width_of(columns, rows.values(), state=max([len("STATE"), *_longest_words(rows.values())]))
    lines = [_header(status), "", _drawn(table, max(width, least), colour)]
    if reasons := list(_reasons(status["models"])):
        lines += ["", *reasons]
    return "\n".join(lines)


def _row(model: dict[str, Any], now: datetime) -> dict[str, str]:
    values = (
        printable(model["id"]),
        state_text(model),
        str(model["port"]),
        str(model["pid"] or "–"),
        str(model["generation"]),
        str(model["restarts"]),
        cpu_ranges(model["cpus"]),
        size(model["memory_bytes"]),
        str(model["active_requests"]),
        since_text(model, now),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _that_fit(rows: Iterable[dict[str, str]], width: int) -> list[str]:
    rows = list(rows)
    columns = list(COLUMNS)
    for column in _DROPPED_FIRST:
        if _width_of(columns, rows, state=min(_state_width(rows), 16)) <= width:
            break
        columns.remove(column)
    return columns


def _state_width(rows: Iterable[dict[str, str]]) -> int:
    return max([len("STATE"), *(len(row["STATE"]) for row in rows)])


def _longest_words(rows: Iterable[dict[str, str]]) -> list[int]:
    return [len(word) for row in rows for word in row["STATE"].split()]


def _width_of(columns: list[str], rows: Iterable[dict[str, str]], *, state: int) -> int:
    rows = list(rows)
    widths = [
        state if column == "STATE" else max([len(column), *(len(row[column]) for row in rows)])
        for column in columns
    ]
    return sum(widths) + _GAP * (len(columns) - 1)


def _header(status: dict[str, Any]) -> str:
    parts = [
        f"citadel-supervisor {status['version']}",
        f"up {duration(status['uptime_s'])}",
        f"router on port {status['ports']['router']}",
        f"daemon {size(status['memory_bytes'])}",
    ]
    if status["draining"]:
        parts.append("draining")
    elif not status["ready"]:
        parts.append("not ready")
    return " · ".join(parts)


def _reasons(models: dict[str, dict[str, Any]]) -> Iterable[str]:
    for name, model in models.items():
        if model["state"] != "ready" and model["reason"]:
            yield printable(f"{name}: {model['reason']}")


def model_details(model: dict[str, Any], *, width: int, colour: bool, now: datetime) -> str:
    """Everything about one model, a line each."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    pid = f"{model['pid']} (engine core {model['core_pid'] or '–'})" if model["pid"] else "–"
    loss = f"last loss: {model['last_loss']}" if model["last_loss"] else ""
    waiting = f", {model['waiting_requests']} waiting" if model["waiting_requests"] else ""
    for name, value in (
        ("model", model["id"]),
        ("state", state_text(model)),
        ("reason", model["reason"] or "–"),
        ("since", f"{model['since'] or '–'} ({since_text(model, now)})"),
        ("port", str(model["port"])),
        ("pid", pid),
        ("generation", f"{model['generation']} ({model['launch'] or 'no process'})"),
        ("restarts", f"{model['restarts']} ({loss})" if loss else str(model["restarts"])),
        ("cpus", cpu_ranges(model["cpus"])),
        ("memory", size(model["memory_bytes"])),
        ("requests", f"{model['active_requests']} active{waiting}"),
        ("checkpoint", model["checkpoint"]),
    ):
        style = _STYLES.get(model["state"], "") if name == "state" else ""
        table.add_row(name, Text(printable(value), style))
    return _drawn(table, width, colour)


def _drawn(table: Table, width: int, colour: bool) -> str:
    sink = io.StringIO()
    console = Console(
        file=sink,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines())


def event_line(event: dict[str, Any], *, colour: bool) -> str:
    """One event in one line, at local time."""
    at = datetime.fromtimestamp(event["at"], UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    text = printable(f"{at}  {_what_happened(event)}").replace("\n", "\\n")
    if colour and event["kind"] == "transition":
        style = _STYLES.get(event["after"], "").split()
        return click.style(text, fg=style[-1] if style and style[-1] != "dim" else None)
    return text


def _what_happened(event: dict[str, Any]) -> str:
    match event["kind"]:
        case "transition":
            reason = f": {event['reason']}" if event["reason"] else ""
            before, after = (event[key].replace("_", " ") for key in ("before", "after"))
            return f"{event['model']} gen {event['generation']}: {before} -> {after}{reason}"
        case "exit":
            status = event["status"]
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            unexpected = "" if event["expected"] else ", unexpected"
            who = f"{event['model']} gen {event['generation']}: {event['part']} (pid {event['pid']})"
            return f"{who} ended with {how}{unexpected}"
        case "audit":
            return (
                f"uid {event['uid']} (pid {event['pid']}): "
                f"{event['action']} {event['target']}: {event['outcome']}"
            )
        case "notice":
            about = f"{event['model']}: " if event["model"] else ""
            return f"{event['level']}: {about}{event['text']}"
        case kind:  # of a newer daemon
            rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("kind", "at"))
            return f"{kind} {rest}"
