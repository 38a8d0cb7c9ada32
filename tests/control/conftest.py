from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.fake_api import Hosted, hosted


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="citadel-") as name:
        yield Path(name)


@pytest.fixture
def host(directory: Path) -> Iterator[Hosted]:
    with hosted(directory) as one:
        yield one
