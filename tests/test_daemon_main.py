"""The command `citadel-supervisor` from outside: output, exit codes, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from citadel_supervisor import __version__
from citadel_supervisor.conf.host import Host
from citadel_supervisor.conf.reference import json_schema
from citadel_supervisor.config import Settings
from citadel_supervisor.daemon_main import main
from citadel_supervisor.errors import AlreadyRunning, CitadelError, ConfigError, DaemonExit, PortTaken
from tests.checkpoints.test_inspect import write_checkpoint

GOOD = "models: {phi-3-mini: {port: 11403, checkpoint: model, memory: 8GB}}"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration whose checkpoint is there, on a host that has everything."""
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "citadel.yaml"
    file.write_text(GOOD)
    host = Host(cpus=(0, 1, 2, 3), memory=64 * 10**9, amx=False, engine=True)
    monkeypatch.setattr("citadel_supervisor.conf.host.read_host", lambda *_: host)
    return file


def call(*words: str | Path, **env: str) -> Result:
    return CliRunner(env={"CITADEL_CONFIG": None, "COLUMNS": "120", **env}).invoke(
        main, [str(w) for w in words]
    )


def test_check_explains_what_would_run(file: Path) -> None:
    result = call(
        "--config", file, "check", CITADEL_GATEWAY__ROUTER_PORT="9123", CITADEL_SOCKET="/x/control.sock"
    )
    assert result.exit_code == DaemonExit.OK, result.output
    for expected in (
        "phi-3-mini",
        "11403",
        "8 GB",
        "1 GiB",
        str(file.parent / "model"),
        "MistralForCausalLM bfloat16",
        "127.0.0.1:9123",
        "/x/control.sock",
        "CITADEL_GATEWAY__ROUTER_PORT: gateway.router_port = 9123",
        "OK: 1 model can run.",
    ):
        assert expected in result.output


def test_check_takes_the_file_before_and_after_its_name_and_from_the_environment(file: Path) -> None:
    for result in (
        call("-c", file, "check"),
        call("check", "--config", file),
        call("--config", "/none", "check", "-c", file),
        call("check", CITADEL_CONFIG=str(file)),
    ):
        assert result.exit_code == DaemonExit.OK, result.output


def test_check_for_scripts(file: Path) -> None:
    result = call("-c", file, "check", "--json")
    assert result.exit_code == DaemonExit.OK
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert data["problems"] == []
    assert data["ports"]["models.phi-3-mini.port"] == 11403
    model = data["models"]["phi-3-mini"]
    assert (model["memory"], model["cpus"]) == (8 * 10**9, [0])
    assert model["checkpoint"]["complete"] is True
    assert model["checkpoint"]["weight_bytes"] == 96


def test_check_with_a_problem(file: Path) -> None:
    (file.parent / "model/config.json").unlink()
    result = call("-c", file, "check")
    assert result.exit_code == DaemonExit.CONFIG
    expected = f"problem models.phi-3-mini.checkpoint: {file.parent}/model: config.json is missing\n  to do: "
    assert expected in result.output
    assert "1 problem." in result.output
    data = json.loads(call("-c", file, "check", "--json").stdout)
    assert data["ok"] is False
    [problem] = data["problems"]
    assert problem["path"] == "models.phi-3-mini.checkpoint"
    assert problem["todo"]


def test_check_shows_no_secrets(file: Path) -> None:
    env = {"CITADEL_MODELS__PHI_3_MINI__ENV": '{"HF_TOKEN": "hush"}'}
    for words in (("check",), ("check", "--json")):
        result = call("-c", file, *words, **env)
        assert result.exit_code == DaemonExit.OK
        assert "CITADEL_MODELS__PHI_3_MINI__ENV" in result.output
        assert "hush" not in result.output


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_refused_file_has_a_line_for_each_problem(file: Path, command: str) -> None:
    file.write_text(
        "gateway: {router_port: x}\nmodels: {a: {port: 1, checkpoint: /x, max_model_length: 3}}\n"
    )
    result = call("-c", file, command)
    assert result.exit_code == DaemonExit.CONFIG
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"citadel-supervisor: configuration refused: {file}",
        "  gateway.router_port: must be a whole number, not 'x'",
        "  models.a.max_model_length: unknown key; did you mean 'max_model_len'?",
    ]


def test_a_refused_file_for_scripts(file: Path) -> None:
    file.write_text("gateway: {router_port: x}\n" + GOOD)
    result = call("-c", file, "check", "--json")
    assert result.exit_code == DaemonExit.CONFIG
    data = json.loads(result.stdout)
    assert data["ok"] is False
    assert data["problems"] == [
        {"path": "gateway.router_port", "what": "must be a whole number, not 'x'", "todo": ""}
    ]


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Settings, Path], int]], None]:
    """Puts a function in the place of the daemon's own `run`."""

    def install(run: Callable[[Settings, Path], int]) -> None:
        module = ModuleType("citadel_supervisor.daemon")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "citadel_supervisor.daemon", module)

    return install


def test_run_hands_the_configuration_over_and_exits_as_the_daemon_does(
    file: Path, daemon: Callable[[Callable[[Settings, Path], int]], None]
) -> None:
    seen: list[tuple[Settings, Path]] = []

    def run(settings: Settings, path: Path) -> int:
        seen.append((settings, path))
        return 5

    daemon(run)
    assert call("-c", file, "run", CITADEL_GATEWAY__ROUTER_PORT="0").exit_code == 5
    [(settings, path)] = seen
    assert settings.gateway.router_port == 0
    assert path == file


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            PortTaken("127.0.0.1:8000", "the router", "pid 12 (nginx)"),
            DaemonExit.PORT_TAKEN,
            "citadel-supervisor: cannot bind 127.0.0.1:8000 for the router: it is held by pid 12 (nginx); "
            "stop it or change the port\n",
        ),
        (
            AlreadyRunning("/run/citadel", "12"),
            DaemonExit.PORT_TAKEN,
            "citadel-supervisor: another citadel-supervisor (pid 12) already runs with /run/citadel; "
            "stop it, or give this one a runtime_dir of its own\n",
        ),
        (
            ConfigError("placement", ["too few cores"]),
            DaemonExit.CONFIG,
            "citadel-supervisor: configuration refused: placement\n  too few cores\n",
        ),
    ],
)
def test_run_says_in_a_line_why_it_cannot_start(
    file: Path,
    daemon: Callable[[Callable[[Settings, Path], int]], None],
    error: CitadelError,
    status: int,
    line: str,
) -> None:
    def run(settings: Settings, path: Path) -> int:
        raise error

    daemon(run)
    result = call("-c", file, "run")
    assert result.exit_code == status
    assert result.stderr == line


def test_a_bug_in_the_daemon_is_not_dressed_up(
    file: Path, daemon: Callable[[Callable[[Settings, Path], int]], None]
) -> None:
    def run(settings: Settings, path: Path) -> int:
        raise ZeroDivisionError

    daemon(run)
    result = call("-c", file, "run")
    assert result.exit_code == DaemonExit.UNEXPECTED
    assert isinstance(result.exception, ZeroDivisionError)


def test_schema_and_its_table() -> None:
    assert call("schema").stdout == json_schema()
    assert "### `gateway`" in call("schema", "--table").stdout


def test_help_teaches() -> None:
    text = call("--help").stdout
    for expected in ("Examples:", "check", "CITADEL_MODELS__PHI_3_MINI__CORES", "citadelctl", "78 "):
        assert expected in text
    assert "Examples:" in call("check", "--help").stdout


def test_a_wrong_command_line_is_exit_code_2() -> None:
    assert call("chekc").exit_code == DaemonExit.USAGE
    assert call("check", "--jsn").exit_code == DaemonExit.USAGE


def test_it_can_be_run_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "citadel_supervisor", "version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"citadel-supervisor {__version__}\n"), done.stderr


LIGHT = """
import re, sys
from pathlib import Path
import citadel_supervisor.daemon_main
from citadel_supervisor.config_load import load_settings
load_settings(Path(sys.argv[1]), {})
heavy = {"torch", "vllm", "transformers", "rich", "numpy"} & set(sys.modules)
resident = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
print(sorted(heavy), resident)
"""


def test_reading_the_configuration_stays_light(file: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("CITADEL_")}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(file)], capture_output=True, text=True, check=False, env=env
    )
    heavy, _, resident = done.stdout.strip().rpartition(" ")
    assert heavy == "[]", done.stderr
    assert int(resident) < 50, "MB; the whole daemon has 80"
