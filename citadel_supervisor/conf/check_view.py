"""How a check's report looks: tables for people, JSON for scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from citadel_supervisor.conf.check import ModelReport, Report
from citadel_supervisor.conf.types import format_bytes


def show(report: Report, console: Console) -> None:
    """Print the report for a person."""
    settings = report.loaded.settings
    console.print(f"[bold]{escape(str(report.loaded.path))}[/]")
    console.print(_models(report))
    console.print("[bold]Checkpoints[/]")
    for line in _checkpoints(report):
        console.print(line, soft_wrap=True)
    console.print("\n[bold]Places[/]")
    console.print(_places(report))
    if report.loaded.overrides:
        console.print("\n[bold]From the environment[/]")
    for override in report.loaded.overrides:
        value = "(not shown)" if override.secret else str(override.value)
        path = ".".join(override.path)
        console.print(f"{override.variable}: {escape(path)} = {escape(value)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"\n[yellow]note[/] {escape(note)}", soft_wrap=True)
    for problem in report.problems:
        line = f"\n[red]problem[/] [bold]{escape(problem.path)}[/]: {escape(problem.what)}"
        console.print(f"{line}\n  to do: {escape(problem.todo)}", soft_wrap=True)
    count = len(report.problems)
    if count:
        console.print(f"\n[red]{count} problem{'s' if count > 1 else ''}.[/]")
    else:
        enabled = sum(model.enabled for model in settings.models.values())
        console.print(f"\n[green]OK:[/] {enabled} model{'s' if enabled != 1 else ''} can run.")


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data. Sizes are bytes."""
    settings = report.loaded.settings
    return {
        "ok": report.ok,
        "config": str(report.loaded.path),
        "problems": [{"path": p.path, "what": p.what, "todo": p.todo} for p in report.problems],
        "notes": list(report.notes),
        "overrides": [
            {"variable": o.variable, "path": ".".join(o.path), "value": None if o.secret else o.value}
            for o in report.loaded.overrides
        ],
        "host": {"cpus": list(report.host.cpus), "memory": report.host.memory, "amx": report.host.amx},
        "ports": settings.ports(),
        "paths": {name: str(path) for name, path in _paths(report).items()},
        "models": {model.name: _model_json(model) for model in report.models},
    }


def _model_json(model: ModelReport) -> dict[str, Any]:
    info, settings = model.checkpoint, model.settings
    return {
        "enabled": settings.enabled,
        "port": settings.port,
        "aliases": list(settings.aliases),
        "cores": settings.cores,
        "cpus": list(model.cpus),
        "memory": settings.memory,
        "kv_cache": settings.kv_cache,
        "max_model_len": settings.max_model_len,
        "checkpoint": {
            "path": str(info.path),
            "complete": not info.problems,
            "problems": list(info.problems),
            "architecture": info.architecture,
            "dtype": info.dtype,
            "quantisation": info.quantisation,
            "weight_bytes": info.weight_bytes,
            "max_context": info.max_context,
        },
    }


def _models(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "port", "cores", "CPUs", "memory", "KV cache", "context"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for model in report.models:
        settings = model.settings
        table.add_row(
            escape(model.name) + ("" if settings.enabled else " (not enabled)"),
            str(settings.port or "any"),
            str(settings.cores),
            _ranges(model.cpus),
            format_bytes(settings.memory),
            format_bytes(settings.kv_cache),
            str(settings.max_model_len),
        )
    return table


def _checkpoints(report: Report) -> Iterator[str]:
    """A line for each checkpoint, with the models that use it."""
    users: dict[Path, list[ModelReport]] = {}
    for model in report.models:
        users.setdefault(model.checkpoint.path, []).append(model)
    for path, models in users.items():
        info = models[0].checkpoint
        names = ", ".join(model.name for model in models)
        state = f"[red]not usable:[/] {escape('; '.join(info.problems))}"
        if not info.problems:
            kind = " ".join(part for part in (info.architecture, info.quantisation or info.dtype) if part)
            state = f"{escape(kind)}, {info.weight_bytes / 1000**3:.2f} GB, knows {info.max_context} tokens"
        yield f"{escape(str(path))}\n  {state}\n  for {escape(names)}"


def _ranges(cpus: tuple[int, ...]) -> str:
    """CPU numbers as people write them: "0-3,8"; "–" where there are none."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "–"


def _places(report: Report) -> Table:
    settings = report.loaded.settings
    gateway = settings.gateway
    table = Table.grid(padding=(0, 2))
    for name, port in (
        ("router", gateway.router_port),
        ("metrics", gateway.metrics_port),
        ("health", gateway.health_port),
    ):
        table.add_row(name, f"{escape(gateway.host)}:{port or '(any)'}")
    for name, path in _paths(report).items():
        table.add_row(name, escape(str(path)))
    return table


def _paths(report: Report) -> dict[str, Path]:
    settings = report.loaded.settings
    return {"state": settings.state_dir, "logs": settings.logs, "control": settings.socket}
