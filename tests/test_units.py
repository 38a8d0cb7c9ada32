"""The systemd files: systemd accepts them, and they agree with the rest of the project."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from citadel_supervisor.config import WorkerSettings
from citadel_supervisor.config_load import load_settings
from citadel_supervisor.errors import DaemonExit

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "units/citadel-supervisor.service"


def settings_of(unit: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    for name in ("citadel-supervisor", "citadelctl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/citadel", str(tmp_path)))
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_and_the_daemon_agree() -> None:
    unit = settings_of(UNIT.read_text(encoding="utf-8"))
    assert unit["Type"] == "notify"
    assert unit["NotifyAccess"] == "main"
    assert unit["KillMode"] == "mixed", "SIGTERM goes to the daemon alone, which drains its workers"
    assert unit["RestartPreventExitStatus"] == str(int(DaemonExit.CONFIG))
    shipped = load_settings(ROOT / "etc/citadel.yaml", {}).workers
    for workers in (shipped, WorkerSettings()):
        assert int(unit["TimeoutStopSec"]) > 2 * (workers.drain_s + workers.stop_grace_s)
    assert unit["ExecStart"].endswith("--config /etc/citadel/citadel.yaml run")


def test_the_user_exists_that_the_unit_runs_as(tmp_path: Path) -> None:
    sysusers = need("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    source = ROOT / "units/citadel-supervisor.sysusers.conf"
    subprocess.run([sysusers, f"--root={tmp_path}", source], capture_output=True, check=True)
    unit = settings_of(UNIT.read_text(encoding="utf-8"))
    assert f"{unit['User']}:x:" in (tmp_path / "etc/passwd").read_text()
    assert f"{unit['Group']}:x:" in (tmp_path / "etc/group").read_text()
    assert load_settings(ROOT / "etc/citadel.yaml", {}).control.group == unit["Group"]


def test_the_operator_s_directory_is_made(tmp_path: Path) -> None:
    tmpfiles = need("systemd-tmpfiles")
    source = ROOT / "units/citadel-supervisor.tmpfiles.conf"
    subprocess.run([tmpfiles, f"--root={tmp_path}", "--create", source], check=True)
    assert (tmp_path / "etc/citadel").stat().st_mode & 0o777 == 0o755
