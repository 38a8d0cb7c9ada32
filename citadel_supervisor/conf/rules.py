"""What settings must hold together, beyond what each is by itself.

A problem is one line that begins with the setting's path, relative to the section that is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from citadel_supervisor.config import ModelSettings, Settings

MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

RESERVED = {
    "auto": "the router's own word",
    "all": "citadelctl's own word",
    "supervisor": "the daemon's own log",
    "zygote": "the zygote's log",
}
"""Names that no model may have, and what has them."""


class Conflicts(ValueError):
    """Settings contradict each other; `problems` as described above."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def refuse(problems: Iterable[str]) -> None:
    """Raise Conflicts where there are any."""
    found = list(problems)
    if found:
        raise Conflicts(found)


def model_conflicts(model: ModelSettings) -> Iterator[str]:
    """What contradicts within one model."""
    if model.launch == "zygote" and (model.device != "cpu" or model.python is not None or model.env):
        yield "launch: 'zygote' serves neither device 'cuda' nor its own 'python' or 'env'; use 'auto'"
    if model.max_num_batched_tokens < model.max_num_seqs:
        yield (
            f"max_num_batched_tokens: {model.max_num_batched_tokens} is less than max_num_seqs, "
            f"{model.max_num_seqs}; each running sequence takes a token a step"
        )


def conflicts(settings: Settings) -> Iterator[str]:
    """What contradicts between sections."""
    yield from _shared_ports(settings)
    yield from _names(settings)
    gateway = settings.gateway
    if not gateway.loopback and not gateway.allow_without_keys:
        yield (
            f"gateway.host: {gateway.host} can be reached from other hosts and nothing asks for a key; "
            "use 127.0.0.1, or say that you want this with gateway.allow_without_keys: true"
        )


def _shared_ports(settings: Settings) -> Iterator[str]:
    taken: dict[int, str] = {}
    for path, port in settings.ports().items():
        if port in taken:
            yield f"{path}: {port} is {taken[port]} as well; give each a port of its own"
        elif port:
            taken[port] = path


def _names(settings: Settings) -> Iterator[str]:
    taken: dict[str, str] = dict(RESERVED)
    for model_id, model in settings.models.items():
        if not MODEL_ID.fullmatch(model_id):
            yield (
                f"models.{model_id}: an id is at most 63 lower-case letters, digits, '.', '_' and '-', "
                "a letter or digit first"
            )
        for name in (model_id, *model.aliases):
            if name in taken:
                yield f"models.{model_id}: the name '{name}' is taken by {taken[name]}"
            taken.setdefault(name, f"models.{model_id}")
    if settings.default_model is not None and settings.default_model not in settings.models:
        yield f"default_model: '{settings.default_model}' is not one of {', '.join(settings.models)}"
