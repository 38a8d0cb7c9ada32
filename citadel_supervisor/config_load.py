"""Reading the configuration: YAML file, then environment, then validation with useful errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from citadel_supervisor.conf.environment import Override, apply_overrides, read_overrides
from citadel_supervisor.conf.paths import DEFAULT_CONFIG
from citadel_supervisor.conf.problems import booleans_for_numbers, explain
from citadel_supervisor.conf.rules import Conflicts
from citadel_supervisor.conf.yaml_file import read_mapping
from citadel_supervisor.config import Settings
from citadel_supervisor.errors import ConfigError

_NEUTRAL: dict[str, Any] = {"port": 0, "checkpoint": "/"}
"""Stand-ins for required settings that are missing, which conflict with nothing."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid configuration, the file it is from and the variables that changed it."""

    settings: Settings
    path: Path
    overrides: tuple[Override, ...]


def load_settings(path: Path | None = None, env: Mapping[str, str] = os.environ) -> Settings:
    """The configuration in `path` with the overrides in `env`. Reads one file; blocks for that long.

    Without a path it is `$CITADEL_CONFIG`, else `/etc/citadel/citadel.yaml`. Raises ConfigError with
    everything that is wrong; looks at no checkpoint, port or core (`citadel-supervisor check` does).
    """
    return load(path, env).settings


def load(path: Path | None = None, env: Mapping[str, str] = os.environ) -> Loaded:
    """Like `load_settings`, and says where everything came from."""
    file = Path(path or env.get("CITADEL_CONFIG") or DEFAULT_CONFIG).absolute()
    data, problems = read_mapping(file)
    models = data.get("models")
    ids = [key for key in models if isinstance(key, str)] if isinstance(models, dict) else []
    overrides, wrong = read_overrides(env, ids)
    problems += wrong
    merged = apply_overrides(data, overrides)
    problems += booleans_for_numbers(merged)
    context = {"base": file.parent}
    try:
        settings = Settings.model_validate(merged, context=context)
    except ValidationError as error:
        problems += explain(error.errors(), overrides)
        problems += _conflicts_besides(error.errors(), merged, context)
    if problems:
        raise ConfigError(str(file), list(dict.fromkeys(problems)))
    return Loaded(settings, file, tuple(overrides))


def _conflicts_besides(found: list[ErrorDetails], data: Any, context: dict[str, Any]) -> list[str]:
    """Conflicts between settings, which pydantic looks for only once each setting is right by itself.

    So the wrong ones are left out and the rest is looked at again, first within models, then between
    sections.
    """
    conflicts: list[str] = []
    while found and all(details["loc"] for details in found):
        before = data
        for details in found:
            for loc in _wrong(details):
                data = _without(data, loc, missing=details["type"] == "missing")
        if data == before:
            break
        try:
            Settings.model_validate(data, context=context)
            found = []
        except ValidationError as error:
            found = error.errors()
            conflicts += explain([each for each in found if each["type"] == "value_error"], [])
    return conflicts


def _wrong(details: ErrorDetails) -> list[tuple[int | str, ...]]:
    """Where the settings are that an error is about."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, Conflicts):
        return [(*details["loc"], line.partition(":")[0]) for line in cause.problems]
    return [details["loc"]]


def _without(data: Any, loc: tuple[int | str, ...], missing: bool) -> Any:
    """A copy of `data` without what `loc` leads to: as much of it as can be left out."""
    if not isinstance(data, dict):
        return data
    key, copy = loc[0], dict(data)
    if len(loc) > 1 and loc[1] != "[key]" and isinstance(data.get(key), dict):
        copy[key] = _without(data[key], loc[1:], missing)
    else:
        copy.pop(key, None)
        if key in _NEUTRAL:
            copy[key] = _NEUTRAL[str(key)]
    return copy
