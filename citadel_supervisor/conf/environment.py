"""Settings from environment variables, on pydantic-settings' own source.

The names are worked out from the sections beforehand, so that a name which means nothing is an error
and not silently without effect; and each variable is read by itself, so that an error names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from citadel_supervisor.conf.reference import Node, fields_of
from citadel_supervisor.config import Settings

PREFIX = "CITADEL_"
NOT_SETTINGS = frozenset({"CITADEL_SOCKET", "CITADEL_CONFIG", "CITADEL_CACHE_DIR"})
"""Variables with this prefix that say where things are, not how the daemon is set."""
TEST_PREFIX = "CITADEL_TEST_"

_MODEL = "model"
"""Stands for a model's id in the name given to pydantic-settings, which splits at every "__"."""


@dataclass(frozen=True, slots=True)
class Override:
    """A variable that sets something. `value` is decoded where the setting is more than a text."""

    variable: str
    path: tuple[str, ...]
    value: Any

    @property
    def secret(self) -> bool:
        """Whether the value may hold what should not be shown: an engine's own environment."""
        return "env" in self.path or (self.path[0] == "models" and len(self.path) < 3)


def read_overrides(env: Mapping[str, str], model_ids: Iterable[str]) -> tuple[list[Override], list[str]]:
    """The overrides in `env`, the more general first, and a line for each variable that is wrong."""
    known, ambiguous = _variables(list(model_ids))
    overrides: list[Override] = []
    problems: list[str] = []
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS or name.startswith(TEST_PREFIX):
            continue
        value, path = env[name], known.get(name.upper())
        if name.upper() in ambiguous:
            problems.append(f"{name}: means {' and '.join(ambiguous[name.upper()])}; set it in the file")
        elif path is None:
            problems.append(f"{name}: {_unknown(name, known)}")
        else:
            try:
                overrides.append(Override(name, path, _decode(path, value)))
            except SettingsError:
                problems.append(f"{name}: not valid JSON, which {'.'.join(path)} takes")
    return sorted(overrides, key=lambda override: len(override.path)), problems


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """`data` with the overrides in it; mappings are merged, everything else is replaced."""
    merged = dict(data)
    for override in overrides:
        value = override.value
        for key in reversed(override.path):
            value = {key: value}
        merged = _merged(merged, value)
    return merged


def slug(key: str) -> str:
    """`key` as a part of a variable's name: "phi-3-mini" is PHI_3_MINI."""
    return re.sub(r"[^A-Z0-9]", "_", key.upper())


def variable(path: Iterable[str]) -> str:
    """The variable that sets the setting at `path`."""
    return PREFIX + "__".join(slug(key) for key in path)


def _variables(model_ids: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """Every variable there is with its path; and those that would mean several, with all of them."""
    known: dict[str, tuple[str, ...]] = {}
    ambiguous: dict[str, list[str]] = {}
    for path in _paths(fields_of(Settings), (), model_ids):
        name = variable(path)
        if name in known:
            ambiguous.setdefault(name, [".".join(known[name])]).append(".".join(path))
        known[name] = path
    return known, ambiguous


def _paths(nodes: Iterable[Node], above: tuple[str, ...], model_ids: list[str]) -> Iterator[tuple[str, ...]]:
    for node in nodes:
        path = (*above, node.name)
        yield path
        if node.by_id:
            for model_id in model_ids:
                yield (*path, model_id)
                yield from _paths(node.children, (*path, model_id), model_ids)
        else:
            yield from _paths(node.children, path, model_ids)


def _unknown(name: str, known: Mapping[str, tuple[str, ...]]) -> str:
    for whole in sorted(known, key=len, reverse=True):
        if name.upper().startswith(f"{whole}__") and known[whole][-1] in ("env", "engine_args"):
            return f"unknown; set {whole} to a JSON object instead"
    # The prefix is the same in all of them and would make anything look near.
    bare = [whole.removeprefix(PREFIX) for whole in known]
    near = difflib.get_close_matches(name.upper().removeprefix(PREFIX), bare, n=1, cutoff=0.6)
    if near:
        return f"unknown variable; did you mean {PREFIX}{near[0]}?"
    return f"unknown variable; each must name a setting: {PREFIX}SECTION__KEY"


class _Shape(Settings, BaseSettings):
    """Tells pydantic-settings what kind of value each setting takes; never instantiated."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", env_parse_none_str="null", case_sensitive=False
    )


class _OneVariable(EnvSettingsSource):
    """pydantic-settings' environment source over a single given variable."""

    def __init__(self, name: str, value: str) -> None:
        self._given = {name.lower(): None if value == "null" else value}
        super().__init__(_Shape)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def _decode(path: tuple[str, ...], raw: str) -> Any:
    """`raw` as the setting at `path` takes it: JSON for lists and mappings, "null" for nothing, else text."""
    if raw == "null":
        return None
    keys = (path[0], _MODEL, *path[2:]) if path[0] == "models" and len(path) > 1 else path
    value: Any = _OneVariable(PREFIX + "__".join(keys), raw)()
    for key in keys:
        value = value[key]
    return value


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result
