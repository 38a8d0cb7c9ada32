"""What pydantic says about a configuration, in words that tell an operator what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from citadel_supervisor.conf.environment import Override
from citadel_supervisor.conf.reference import MODEL_KEY, Node, at, fields_of
from citadel_supervisor.conf.rules import Conflicts
from citadel_supervisor.conf.types import Section
from citadel_supervisor.config import Settings

_NUMBERS = (int, float)
_WORDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}
_SHOWN = 60
"""Characters of a wrong value that a message shows."""


def explain(found: Iterable[ErrorDetails], overrides: Sequence[Override]) -> list[str]:
    """A line for each thing wrong: the dotted path, what is wrong, what to write instead."""
    return [line for details in found for line in _lines(details, overrides)]


def booleans_for_numbers(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for each yes, no, on or off where a number belongs: pydantic would take them for 1 and 0."""
    yield from _booleans(Settings, data, "")


def _booleans(section: type[Section], data: Mapping[str, Any], above: str) -> Iterator[str]:
    for node in fields_of(section):
        value = data.get(node.name)
        path = f"{above}{node.name}"
        if isinstance(value, bool) and _is_number(node):
            yield f"{path}: must be a number, not {str(value).lower()}"
        if node.section is None or not isinstance(value, Mapping):
            continue
        parts = {f"{path}.{key}.": part for key, part in value.items()} if node.by_id else {f"{path}.": value}
        for prefix, part in parts.items():
            if isinstance(part, Mapping):
                yield from _booleans(node.section, part, prefix)


def _is_number(node: Node) -> bool:
    return node.field.annotation in _NUMBERS


def _lines(details: ErrorDetails, overrides: Sequence[Override]) -> list[str]:
    loc = details["loc"]
    if loc[-1:] == ("[key]",):
        return []  # a key that is not text: reading the file noted it, with its line
    path = ".".join(key if str(key).isprintable() else ascii(key) for key in map(str, loc))
    source = _source(loc, overrides)
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, Conflicts):
        return [f"{path}.{line}" if path else line for line in cause.problems]
    return [f"{path}{source}: {_what(details)}"]


def _source(loc: tuple[int | str, ...], overrides: Sequence[Override]) -> str:
    """Names the variable where the value came from the environment."""
    for override in reversed(overrides):
        if loc[: len(override.path)] == override.path:
            return f" (from {override.variable})"
    return ""


def _what(details: ErrorDetails) -> str:
    kind, ctx, loc = details["type"], details.get("ctx", {}), details["loc"]
    value = _shown(details)
    if kind == "extra_forbidden":
        return f"unknown key; {_nearest(loc)}"
    if kind == "missing":
        return f"required: {_meaning(loc)}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error":
        return f"must be {ctx['expected']}{value}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping ('key: value' lines below it){value}"
    if kind in ("tuple_type", "list_type"):
        return f"must be a list, for instance [one, two]{value}"
    if kind == "string_type":
        return f"must be text{value}" + (", so write it in quotes" if value else "")
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return f"must start with a letter or digit and hold only letters, digits and . _ : / @ + -{value}"
    if kind in _WORDS:
        return f"must be {_WORDS[kind].format(**ctx)}{value}"
    message = details["msg"].removeprefix("Input should ").removeprefix("Value ")
    return f"must {message}{value}" if details["msg"].startswith("Input should ") else message


def _shown(details: ErrorDetails) -> str:
    """ ", not X" for a simple value; an engine's own environment is not shown."""
    value = details["input"]
    if "env" in details["loc"] or not isinstance(value, str | int | float | bool):
        return ", not empty" if value is None else ""
    return f", not {str(value)[:_SHOWN]!r}" if isinstance(value, str) else f", not {str(value).lower()}"


def _meaning(loc: tuple[int | str, ...]) -> str:
    section = at(loc[:-1])
    field = section.model_fields.get(str(loc[-1])) if section else None
    text = " ".join(((field.description if field else None) or "").split())
    return text[:1].lower() + text[1:].rstrip(".") if text else "it has no default"


def _nearest(loc: tuple[int | str, ...]) -> str:
    """The key that was probably meant: at this level, else of that very name elsewhere."""
    key, section = str(loc[-1]), at(loc[:-1])
    allowed = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key.lower().replace("-", "_"), allowed, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    elsewhere = [path for path in _all_paths() if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return f"allowed here: {', '.join(allowed)}"


def _all_paths() -> Iterator[str]:
    def below(section: type[Section], above: str) -> Iterator[str]:
        for node in fields_of(section):
            path = f"{above}{node.name}"
            yield path
            if node.section is not None:
                yield from below(node.section, f"{path}.{MODEL_KEY}." if node.by_id else f"{path}.")

    return below(Settings, "")
