"""What an operator may ask of the running daemon; the control server calls it, so does the daemon."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil

from citadel_supervisor import __version__
from citadel_supervisor.config import ModelSettings, Settings
from citadel_supervisor.errors import UnknownModel
from citadel_supervisor.events import EventBus, Notice, as_dict
from citadel_supervisor.placement import place
from citadel_supervisor.states import WorkerSnapshot
from citadel_supervisor.topology import read_topology
from citadel_supervisor.workers.fleet import Fleet

BOUND_AT_START = ("port", "aliases")
"""Settings of a model that the gateway reads once; changing them needs a restart of the daemon."""

NOT_THE_ENGINES = ("description", "objectives", "concurrency", "memory")
"""Settings of a model that are taken over without a new generation."""


class Supervisor:
    """The operator's side of the daemon: control.protocol.SupervisorApi."""

    def __init__(
        self,
        settings: Settings,
        config_path: Path | None,
        fleet: Fleet,
        bus: EventBus,
        ports: dict[str, int],
        load: Callable[[Path | None], Settings],
    ) -> None:
        """`ports` are the bound ones, by "router", "metrics", "health" and model id."""
        self._settings = settings
        self._config_path = config_path
        self._fleet = fleet
        self._bus = bus
        self._ports = ports
        self._load = load
        self._began = time.monotonic()
        self._self = psutil.Process()
        self.draining = False

    def status(self) -> dict[str, Any]:
        """The whole status, JSON-ready. Cheap: nothing is measured for it but the daemon's own memory."""
        zygote = self._fleet.zygote_status()
        return {
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "pid": os.getpid(),
            "ready": self._fleet.all_ready() and not self.draining,
            "draining": self.draining,
            "memory_bytes": self._self.memory_info().rss,
            "config": str(self._config_path) if self._config_path else None,
            "ports": {name: self._ports[name] for name in ("router", "metrics", "health")},
            "zygote": {
                "state": zygote.state,
                "pid": zygote.pid,
                "preload_s": zygote.preload_s,
                "reason": zygote.reason,
            },
            "models": {name: self.model_status(name) for name in self._fleet.workers},
        }

    def model_status(self, model: str) -> dict[str, Any]:
        """One model's part of the status. Raises UnknownModel."""
        seen: WorkerSnapshot = self._fleet.worker(model).snapshot()
        return {
            "id": model,
            "state": str(seen.state),
            "reason": seen.reason,
            "port": self._ports[model],
            "pid": seen.pid,
            "core_pid": seen.core_pid,
            "generation": seen.generation,
            "restarts": seen.restarts,
            "last_loss": seen.last_loss,
            "cpus": list(seen.cpus),
            "memory_bytes": self._fleet.memory.get(model, 0) if seen.pid else 0,
            "active_requests": seen.active_requests,
            "waiting_requests": seen.waiting_requests,
            "since": datetime.datetime.fromtimestamp(seen.since, datetime.UTC).isoformat(
                timespec="milliseconds"
            ),
            "progress": seen.progress.text(),
            "launch": seen.launch,
            "checkpoint": str(self._settings.models[model].checkpoint_path),
            "ready_after_s": seen.ready_after_s,
        }

    async def start(self, model: str, wait: bool) -> dict[str, Any]:
        """Start a stopped, quarantined or backing-off worker; put a drained one back."""
        worker = self._fleet.worker(model)
        worker.start()
        return await self._outcome(model, wait)

    async def stop(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        """Drain, then end the worker's processes."""
        self._fleet.worker(model).stop(drain_s)
        return await self._outcome(model, wait)

    async def restart(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        """Drain, end and start again; requests that arrive meanwhile wait."""
        self._fleet.worker(model).restart(drain_s)
        return await self._outcome(model, wait)

    async def drain(self, model: str, wait: bool) -> dict[str, Any]:
        """Take nothing new, finish what runs, keep the engine loaded."""
        self._fleet.worker(model).drain()
        return await self._outcome(model, wait)

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again and apply what changed of the models.

        An invalid one changes nothing (ConfigError). What cannot be applied to a running daemon is
        listed under "restart_needed" and not applied.
        """
        fresh = await asyncio.to_thread(self._load, self._config_path)
        applied, restart_needed = merge(self._settings, fresh)
        before, after = place(self._settings, read_topology()), place(applied, read_topology())
        changed = [
            name
            for name, model in applied.models.items()
            if _engine_part(model) != _engine_part(self._settings.models[name])
            or before.cpus[name] != after.cpus[name]
        ]
        self._settings = applied
        self._fleet.apply(applied, after, changed)
        text = f"configuration reloaded: changed {', '.join(changed) or 'nothing'}"
        if restart_needed:
            text += f"; needs a restart of the daemon: {', '.join(restart_needed)}"
        self._bus.publish(Notice(level="INFO", text=text))
        unchanged = [name for name in applied.models if name not in changed]
        return {"changed": changed, "unchanged": unchanged, "restart_needed": restart_needed}

    def recent_events(self) -> list[dict[str, Any]]:
        """The last events that are not requests, oldest first."""
        return [as_dict(event) for event in self._bus.recent()]

    async def follow_events(self) -> AsyncIterator[dict[str, Any]]:
        """Every event from now on."""
        async for event in self._bus.follow():
            yield as_dict(event)

    def log_path(self, model: str) -> Path:
        """The log file of a model, of the "zygote" or of the "supervisor". Raises UnknownModel."""
        names = [*self._fleet.workers, "zygote", "supervisor"]
        if model not in names:
            raise UnknownModel(model, names)
        return self._settings.logs / f"{model}.log"

    async def _outcome(self, model: str, wait: bool) -> dict[str, Any]:
        if wait:
            await self._fleet.worker(model).settled()
        return self.model_status(model)


def _engine_part(model: ModelSettings) -> dict[str, Any]:
    """What a new generation is needed for."""
    return model.model_dump(exclude=set(NOT_THE_ENGINES))


def merge(running: Settings, fresh: Settings) -> tuple[Settings, list[str]]:
    """The settings to run with from now on, and the paths of what only a restart can change."""
    restart_needed = [
        name
        for name in type(fresh).model_fields
        if name != "models" and getattr(fresh, name) != getattr(running, name)
    ]
    models: dict[str, ModelSettings] = {}
    for name, model in running.models.items():
        if name not in fresh.models:
            restart_needed.append(f"models.{name} (removed)")
            models[name] = model
            continue
        wanted = fresh.models[name]
        kept = {field: getattr(model, field) for field in BOUND_AT_START}
        restart_needed += [
            f"models.{name}.{field}" for field in BOUND_AT_START if getattr(wanted, field) != kept[field]
        ]
        models[name] = wanted.model_copy(update=kept)
    restart_needed += [f"models.{name} (added)" for name in fresh.models if name not in running.models]
    return running.model_copy(update={"models": models}), restart_needed
