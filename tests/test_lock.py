"""The locks: complete, and free of where they were made."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[1] / "requirements"


def left_out() -> set[str]:
    """Packages that the lock leaves out on purpose; overrides.txt says why for each."""
    return set(re.findall(r"^([a-z-]+);", (REQUIREMENTS / "overrides.txt").read_text(), re.MULTILINE))


@pytest.mark.engine
def test_nothing_is_missing_but_what_is_left_out_on_purpose() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    missing = set(re.findall(r" requires ([\w-]+), which is not installed", done.stdout))
    assert missing <= left_out() - {"torch"}
    assert "has requirement" not in done.stdout, "no version contradicts another package's wish"


@pytest.mark.parametrize("name", ["cpu.lock", "dev.lock"])
def test_a_lock_pins_and_hashes_everything_and_names_no_place(name: str) -> None:
    text = (REQUIREMENTS / name).read_text()
    assert "://" not in text and "--index-url" not in text and "--find-links" not in text
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    assert not {entry.split("==")[0] for entry in entries} & left_out()
