"""Where made checkpoints are kept, outside the source tree. Stdlib only."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$CITADEL_CACHE_DIR`, else `$XDG_CACHE_HOME/citadel-supervisor`, else `~/.cache/citadel-supervisor`.

    The directory need not exist. Relative values are taken from the current directory, except that of
    XDG_CACHE_HOME, which its specification says to ignore.
    """
    if own := os.environ.get("CITADEL_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "citadel-supervisor"


def checkpoint_dir(name: str) -> Path:
    """Where the checkpoint called `name` is, or would be once made."""
    return cache_dir() / "checkpoints" / name
