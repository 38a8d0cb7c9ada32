"""Checkpoints with something wrong in them, made from good ones."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

WEIGHTS = "model.safetensors"


def truncated(source: Path, out: Path) -> Path:
    """A copy whose weights end in the middle."""
    shutil.copytree(source, out)
    os.truncate(out / WEIGHTS, (out / WEIGHTS).stat().st_size // 2)
    return out


def perturbed(source: Path, out: Path, tensor: str) -> Path:
    """A copy in which one tensor is zero. It has the form, and the record, of the good one."""
    out.mkdir()
    for file in source.iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, out / file.name)
    shutil.copy(source / WEIGHTS, out / WEIGHTS)
    with (out / WEIGHTS).open("r+b") as weights:
        (length,) = struct.unpack("<Q", weights.read(8))
        first, end = json.loads(weights.read(length))[tensor]["data_offsets"]
        weights.seek(8 + length + first)
        weights.write(bytes(end - first))
    return out
