"""Reading one YAML file into plain mappings, strictly."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from citadel_supervisor.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


def read_mapping(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's mapping, and a line for each key that stands twice or is not text.

    Raises ConfigError where there is no mapping to speak of: no file, no right to read it, not YAML,
    something other than a mapping.
    """
    text = _read(path)
    try:
        loader = _StrictLoader(text)
        data = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [_syntax(error)]) from error
    except (ValueError, RecursionError) as error:
        # PyYAML does not translate these itself: a date like 2026-13-01, ten thousand brackets.
        raise ConfigError(str(path), [f"not valid YAML: {error}"]) from error
    if data is None:
        raise ConfigError(str(path), ["the file is empty; it must at least name one model under 'models:'"])
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise ConfigError(str(path), [f"must be a mapping of settings ('key: value' lines), not {kind}"])
    return data, loader.problems


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        advice = "there is no such file; name one with --config or CITADEL_CONFIG"
        raise ConfigError(str(path), [advice]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text (byte {error.start})"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {(error.strerror or str(error)).lower()}"]) from error


def _syntax(error: yaml.YAMLError) -> str:
    """One line about a syntax error, with its place counted from 1."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {said}"
    return f"not valid YAML: {' '.join(str(error).split())}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that notes keys which PyYAML would silently drop or which are not text."""

    def __init__(self, stream: str) -> None:
        self.problems: list[str] = []
        super().__init__(stream)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                self.problems.append(
                    f"line {line}: the key {key.value!r} is there already, in line {seen[key.value]}"
                )
            elif key.tag != "tag:yaml.org,2002:str":
                self.problems.append(f"line {line}: the key {key.value!r} is not text; write it in quotes")
            seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep)
