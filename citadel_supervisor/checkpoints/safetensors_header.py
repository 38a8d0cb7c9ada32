"""What a safetensors file says it holds: its header, never its tensors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from citadel_supervisor.errors import CheckpointError

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors' names, their types, and the bytes they take."""

    names: frozenset[str]
    dtypes: frozenset[str]
    weight_bytes: int


def read_header(path: Path) -> Header:
    """The header of `path`: eight bytes of length, then JSON. Reads some kilobytes, whatever the file's size.

    Raises CheckpointError where the file is not safetensors or is shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path.name} is not a safetensors file, or cut off: {size} bytes")
            entries = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged: its header is not JSON") from error
    return _header(path.name, entries, size - 8 - length)


def _header(name: str, entries: Any, held: int) -> Header:
    if not isinstance(entries, dict):
        raise CheckpointError(f"{name} is damaged: its header is not a table of tensors")
    tensors = {key: entry for key, entry in entries.items() if key != "__metadata__"}
    try:
        spans = [entry["data_offsets"] for entry in tensors.values()]
        dtypes = frozenset(str(entry["dtype"]) for entry in tensors.values())
        weight_bytes = sum(int(end) - int(begin) for begin, end in spans)
        needed = max((int(end) for _, end in spans), default=0)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: its header is not a table of tensors") from error
    if held != needed:
        state = "cut off" if held < needed else "longer than it says"
        raise CheckpointError(
            f"{name} is {state}: it holds {held} bytes of tensors where its header says {needed}"
        )
    return Header(frozenset(tensors), dtypes, weight_bytes)
