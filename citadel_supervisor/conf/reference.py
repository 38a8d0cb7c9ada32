"""The settings as a tree, as a JSON schema for editors, and as tables for the operator's guide.

All three are made from the sections in `config.py`: the docstrings there are the only place where a
setting is explained.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from citadel_supervisor.conf.types import Section, format_bytes, parse_bytes
from citadel_supervisor.config import Settings

MODEL_KEY = "<id>"
TABLE_BEGINS = "<!-- settings: made by scripts/write-reference -->"
TABLE_ENDS = "<!-- end of settings -->"


@dataclass(frozen=True, slots=True)
class Node:
    """One setting. It has `children` where it is a section, or holds sections by an id (`by_id`)."""

    name: str
    field: FieldInfo
    section: type[Section] | None
    by_id: bool

    @property
    def children(self) -> list[Node]:
        return fields_of(self.section) if self.section is not None else []


def fields_of(section: type[Section]) -> list[Node]:
    """The settings of `section`, in their order."""
    return [_node(name, field) for name, field in section.model_fields.items()]


def at(path: Iterable[str | int]) -> type[Section] | None:
    """The section at `path` of the whole configuration, or None where there is none."""
    section: type[Section] | None = Settings
    by_id = False
    for key in path:
        if by_id:
            by_id = False
            continue
        node = next((node for node in fields_of(section) if node.name == key), None) if section else None
        if node is None:
            return None
        section, by_id = node.section, node.by_id
    return None if by_id else section


def json_schema() -> str:
    """The JSON schema of a configuration file, as text that ends with a newline."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Settings.model_json_schema(),
        "title": "Configuration of citadel-supervisor",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def settings_table() -> str:
    """Every setting in Markdown tables, one a section."""
    return "\n".join(_tables(Settings, ""))


def with_table(guide: str, table: str) -> str:
    """`guide` with `table` between its two markers. Raises ValueError where it has none."""
    before, begin, rest = guide.partition(TABLE_BEGINS)
    _, end, after = rest.partition(TABLE_ENDS)
    if not (begin and end):
        raise ValueError(f"the guide lacks the markers {TABLE_BEGINS} and {TABLE_ENDS}")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def _node(name: str, field: FieldInfo) -> Node:
    annotation = field.annotation
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[-1]
        return Node(name, field, inner, True) if _is_section(inner) else Node(name, field, None, False)
    return Node(name, field, annotation if _is_section(annotation) else None, False)


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return inspect.isclass(annotation) and issubclass(annotation, Section)


def _tables(section: type[Section], path: str) -> Iterator[str]:
    title = f"`{path.rstrip('.')}`" if path else "Top level"
    yield f"### {title}\n\n{_sentence(inspect.getdoc(section))}\n"
    yield "| setting | takes | default | meaning |\n|---|---|---|---|"
    nested = []
    for node in fields_of(section):
        if node.section is not None:
            nested.append(node)
        else:
            field = node.field
            cells = (f"`{node.name}`", _takes(field), _default(field), _sentence(field.description))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for node in nested:
        below = f"{path}{node.name}." + (f"{MODEL_KEY}." if node.by_id else "")
        yield from _tables(typing.cast("type[Section]", node.section), below)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _takes(field: FieldInfo) -> str:
    """What kind of value, in words, with its bounds."""
    return _kind(field.annotation, field.metadata)


def _kind(annotation: Any, metadata: Iterable[Any]) -> str:
    origin = get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return ", or ".join([*(_kind(part, ()) for part in inner), "null"])
    if origin is typing.Annotated:
        inner, *marks = get_args(annotation)
        return _kind(inner, [item for mark in marks for item in getattr(mark, "metadata", [mark])])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return "list of text"
    if annotation is int and _is_size(metadata):
        return "size"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return names[annotation] + _bounds(metadata)


def _is_size(metadata: Iterable[Any]) -> bool:
    return any(getattr(item, "func", None) is parse_bytes for item in metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    over, least, most = (
        next((value for item in metadata if (value := getattr(item, name, None)) is not None), None)
        for name in ("gt", "ge", "le")
    )
    if over is not None:
        return f" over {over}"
    if least is None:
        return ""
    return f" from {least}" + (f" to {most}" if most is not None else "")


def _default(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        return "required"
    if default is PydanticUndefined or default in (None, "", (), {}):
        return "–"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and _is_size(field.metadata):
        return format_bytes(default)
    return f"`{default}`" if isinstance(default, str) else f"{default:g}"
