"""What the daemon refuses before it touches anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from citadel_supervisor.config import Settings
from citadel_supervisor.daemon import run
from citadel_supervisor.errors import StartError


def test_a_runtime_directory_too_deep_for_sockets_is_refused_at_once(tmp_path: Path) -> None:
    runtime = tmp_path / ("deep" * 20)
    settings = Settings.model_validate(
        {
            "state_dir": str(tmp_path / "state"),
            "runtime_dir": str(runtime),
            "models": {"alpha": {"port": 0, "checkpoint": "/nowhere"}},
        }
    )
    with pytest.raises(StartError, match="shorten runtime_dir"):
        run(settings, None)
    assert not runtime.exists()
