"""The kinds of value that settings are made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power


class Section(BaseModel):
    """A part of the configuration: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


def parse_bytes(value: object) -> object:
    """Bytes from "90GB", "512 MiB" or a number; anything else is returned for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"not a size: {value!r}; write for instance 512MB, 4GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(size: int) -> str:
    """`size` as people write it: in the binary or decimal unit that needs no fraction, else rounded.

    What it writes without rounding, `parse_bytes` reads back to the same number.
    """
    for base, suffix in ((1024, "iB"), (1000, "B")):
        for power, letter in ((4, "T"), (3, "G"), (2, "M")):
            if size and size % base**power == 0:
                return f"{size // base**power} {letter}{suffix}"
    for power, letter in ((3, "G"), (2, "M")):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {letter}B"
    return f"{size} B"


def anchored(path: Path, info: ValidationInfo) -> Path:
    """`path` with `~` expanded and, where it is relative, taken from the configuration file's directory.

    The loader hands that directory over as the validation context's "base"; without one the path stays
    relative. The daemon's working directory means nothing to whoever writes the file.
    """
    base = (info.context or {}).get("base") if isinstance(info.context, dict) else None
    try:
        expanded = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no home directory is known for it") from error
    return Path(base) / expanded if base is not None else expanded


def _anchored_checkpoint(value: str, info: ValidationInfo) -> str:
    scheme, colon, name = value.partition(":")
    if scheme == "cache" and colon:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"{value!r} names no cached checkpoint; write for instance cache:SmolLM2-135M-Instruct"
            )
        return value
    return str(anchored(Path(value), info))


_SizeText = Annotated[str, Field(pattern=r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]?[iI]?[bB])?\s*$")]
Bytes = Annotated[int, Field(gt=0), BeforeValidator(parse_bytes, json_schema_input_type=int | _SizeText)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LocalPath = Annotated[Path, AfterValidator(anchored)]
Checkpoint = Annotated[str, Field(min_length=1), AfterValidator(_anchored_checkpoint)]
"""A directory, or "cache:NAME"."""
Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]
"""Another name of a model: what clients may write."""
