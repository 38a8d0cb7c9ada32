"""What `citadel-supervisor check` finds out: what would run on this host, and what stands in its way.

Looks only at this host, at the files and at the ports; starts nothing and changes nothing.
"""

from __future__ import annotations

import grp
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from citadel_supervisor.checkpoints.inspect import CheckpointInfo, inspect_checkpoint
from citadel_supervisor.conf.host import Host
from citadel_supervisor.conf.types import format_bytes
from citadel_supervisor.config import ModelSettings, Settings
from citadel_supervisor.config_load import Loaded
from citadel_supervisor.errors import ConfigError
from citadel_supervisor.placement import Placement, place
from citadel_supervisor.topology import Topology

PROCESS_BYTES = 410 * 1024**2
"""What a worker needs besides weights, KV cache and embeddings: 140 MiB in the engine core and 270 MiB in
the API process, measured on small models. Buffers, up to 300 MiB, are left out: this is a lower bound."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that would keep the configuration from running as written, and what to do about it."""

    path: str
    what: str
    todo: str


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model: its settings, what its checkpoint holds and the CPUs it would get."""

    name: str
    settings: ModelSettings
    checkpoint: CheckpointInfo
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything there is to say. `notes` are worth knowing but stop nothing."""

    loaded: Loaded
    host: Host
    models: tuple[ModelReport, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def examine(
    loaded: Loaded, host: Host, inspect: Callable[[Path], CheckpointInfo] = inspect_checkpoint
) -> Report:
    """Look at everything. Blocks for the checkpoints' headers, some kilobytes a file."""
    settings = loaded.settings
    problems: list[Problem] = []
    try:
        placement = place(settings, Topology(host.cpus))
    except ConfigError as error:
        placement = Placement({}, {}, False)
        problems += [_split_advice("models.*.cores", line) for line in error.problems]
    models = tuple(
        ModelReport(name, model, inspect(model.checkpoint_path), placement.cpus.get(name, ()))
        for name, model in settings.models.items()
    )
    for model in models:
        if model.settings.enabled:
            problems += _model_problems(model, host)
    problems += _host_problems(settings, host)
    return Report(loaded, host, models, tuple(problems), tuple(_notes(settings, models, placement, host)))


def lower_bound(model: ModelReport) -> int:
    """Bytes that the worker needs at the least; 0 where the checkpoint does not say enough."""
    info = model.checkpoint
    if not info.weight_bytes:
        return 0
    embeddings = 2 * info.vocab_size * info.hidden_size * 2
    return info.weight_bytes + model.settings.kv_cache + embeddings + PROCESS_BYTES


def _split_advice(path: str, line: str) -> Problem:
    what, _, todo = line.partition(": ")
    return Problem(path, what, todo)


def _model_problems(model: ModelReport, host: Host) -> Iterator[Problem]:
    info, settings, path = model.checkpoint, model.settings, f"models.{model.name}"
    if info.problems:
        cached = settings.checkpoint.startswith("cache:")
        yield Problem(
            f"{path}.checkpoint",
            f"{info.path}: {'; '.join(info.problems)}",
            "run 'make weights' in the source tree"
            if cached
            else "put the model's Hugging Face directory there, or name the right one",
        )
    else:
        yield from _fit(model, host)
    for name, file in (("chat_template", settings.chat_template), ("python", settings.python)):
        if file is not None and not file.is_file():
            yield Problem(f"{path}.{name}", f"{file} is not a file", "correct the path")


def _fit(model: ModelReport, host: Host) -> Iterator[Problem]:
    """Whether the checkpoint fits the model's own settings and this host's CPU."""
    info, settings, path = model.checkpoint, model.settings, f"models.{model.name}"
    needed = lower_bound(model)
    if needed > settings.memory:
        yield Problem(
            f"{path}.memory",
            f"{format_bytes(settings.memory)} is too little by at least {_gb(needed - settings.memory)}: "
            f"weights {_gb(info.weight_bytes)}, KV cache {_gb(settings.kv_cache)}, the rest of the worker "
            f"{_gb(needed - info.weight_bytes - settings.kv_cache)}",
            "raise the budget, lower kv_cache, or use a checkpoint quantised further",
        )
    if 0 < info.max_context < settings.max_model_len:
        yield Problem(
            f"{path}.max_model_len",
            f"{settings.max_model_len} tokens, and the checkpoint knows {info.max_context}",
            f"set it to {info.max_context} or less",
        )
    # With a sliding window a request needs less than its whole length; how much, only the engine knows.
    width = 1 if settings.kv_cache_dtype != "auto" else 4 if settings.dtype == "float32" else 2
    whole = 0 if info.sliding_window else info.kv_bytes_per_token(width) * settings.max_model_len
    if whole > settings.kv_cache:
        yield Problem(
            f"{path}.kv_cache",
            f"{format_bytes(settings.kv_cache)} does not hold one request of max_model_len "
            f"({settings.max_model_len} tokens need {-(-whole // 1024**2)} MiB)",
            "raise kv_cache or lower max_model_len",
        )
    if info.quantisation and info.experts and settings.device == "cpu" and not host.amx:
        yield Problem(
            f"{path}.checkpoint",
            f"a quantised mixture of experts ({info.quantisation}) needs AMX, which this CPU has not",
            "use a host whose /proc/cpuinfo says amx_tile, or a checkpoint in bf16",
        )


def _host_problems(settings: Settings, host: Host) -> Iterator[Problem]:
    enabled = [model for model in settings.models.values() if model.enabled]
    if not host.engine and any(model.python is None for model in enabled):
        yield Problem(
            "models", "vLLM is not installed in this environment", "run 'make venv' or 'make install'"
        )
    for path, port in settings.ports().items():
        refused = host.refusal(settings.gateway.host, port)
        if refused:
            yield Problem(path, refused, "stop what holds it, or choose another port")
    group = settings.control.group
    if group is not None and not _group_exists(group):
        yield Problem("control.group", f"there is no group '{group}'", "create it, or leave the setting out")


def _notes(
    settings: Settings, models: tuple[ModelReport, ...], placement: Placement, host: Host
) -> Iterator[str]:
    if settings.banner:
        yield settings.banner
    if placement.shared:
        yield "engines share cores: there are fewer than the models ask for (workers.oversubscribe)"
    budgets = (
        sum(model.memory for model in settings.models.values() if model.enabled) + settings.gateway.memory
    )
    if budgets > host.memory:
        yield (
            f"the memory budgets add up to {_gb(budgets)} and this host has {_gb(host.memory)}; "
            "they are limits, but all workers cannot use theirs at once"
        )
    for model in models:
        if not model.settings.enabled:
            yield f"{model.name} is not enabled: it stays stopped until 'citadelctl start {model.name}'"
        elif _no_chat(model):
            yield f"{model.name} has no chat template: it will refuse chat completions"
    if not settings.gateway.loopback:
        yield f"whoever reaches {settings.gateway.host} can use the models: nothing asks for a key"
    if host.running:
        yield "a supervisor is running with this control socket, so its ports were not looked at"


def _no_chat(model: ModelReport) -> bool:
    info = model.checkpoint
    return not info.problems and not info.chat_template and model.settings.chat_template is None


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _gb(size: int) -> str:
    return f"{size / 1000**3:.1f} GB"
