"""citadelctl against a served fake supervisor: what an operator and a script see."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from citadel_supervisor.cli import render
from citadel_supervisor.cli.commands import cli
from citadel_supervisor.errors import CommandRefused, ConfigError
from citadel_supervisor.events import Audit, Notice, Transition, WorkerExited, as_dict
from citadel_supervisor.states import WorkerState
from tests.control.fake_api import SINCE, Hosted, fake_model, fake_status, hosted

CITADELCTL = (sys.executable, "-c", "from citadel_supervisor.cli import main; main()")


@pytest.fixture
def host() -> Iterator[Hosted]:
    with tempfile.TemporaryDirectory(prefix="citadel-") as name, hosted(Path(name)) as one:
        yield one


def run(host: Hosted, *arguments: str) -> Result:
    """Run citadelctl in this process."""
    return CliRunner().invoke(cli, ["--socket", str(host.socket), *arguments])


def start(host: Hosted, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Run citadelctl as a process, its outputs piped."""
    command = [*CITADELCTL, "--socket", str(host.socket), *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, **options)


def run_on_terminal(
    host: Hosted, *arguments: str, columns: int = 80, env: dict[str, str] | None = None
) -> tuple[str, int]:
    """Run citadelctl on a terminal of its own: all it writes there, and its exit code."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color"} | (env or {})
    process = start(host, *arguments, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    parts = []
    try:
        while part := os.read(master, 65536):
            parts.append(part)
    except OSError:  # how Linux tells that the last process has left the terminal
        pass
    os.close(master)
    return b"".join(parts).decode().replace("\r\n", "\n"), process.wait(60)


def without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# status


def test_status_shows_every_model_and_whole_ids_when_piped(host: Hosted) -> None:
    long_id = "a-model-with-a-very-long-name-indeed-0123456789-0123456789-abcde"[:63]
    host.api.models[long_id] = fake_model(long_id, 11404, cpus=[0, 1, 2, 8, 10, 11], state="stopped")
    result = run(host, "status")
    assert result.exit_code == 0
    header, _, titles, *rows = result.stdout.splitlines()
    assert header == "citadel-supervisor 0.1.0 · up 3 h 3 min · router on port 8000 · daemon 61 MB"
    assert titles.split() == list(render.COLUMNS)
    assert rows[0].split()[:9] == ["mixtral-8x7b", "ready", "in", "4.2", "s", "11400", "4194300", "1", "0"]
    assert rows[0].split()[9:13] == ["0-3", "1.6", "GB", "2"]
    assert rows[2].split()[:2] == [long_id, "stopped"]
    assert "0-2,8,10-11" in rows[2]
    assert "\x1b" not in result.stdout


def test_status_gives_the_reason_for_what_is_not_ready(host: Hosted) -> None:
    host.api.models["phi-3-mini"] |= {"state": "quarantined", "reason": "checkpoint is damaged: shard 2"}
    lines = run(host, "status").stdout.splitlines()
    assert lines[-1] == "phi-3-mini: checkpoint is damaged: shard 2"
    assert sum("damaged" in line for line in lines) == 1


def test_status_of_one_model_tells_everything(host: Hosted) -> None:
    host.api.models["phi-3-mini"] |= {"state": "loading", "progress": "weights 45 % (120 of 269 MB)"}
    text = run(host, "status", "phi-3-mini").stdout
    for part in ("weights 45 % (120 of 269 MB)", "4194300 (engine core 4194301)", "/opt/models/phi-3-mini"):
        assert part in text
    assert SINCE.isoformat() in text
    assert "mixtral" not in text


def test_status_json_is_the_daemons_own(host: Hosted) -> None:
    for arguments in (["--json", "status"], ["status", "--json"]):
        assert json.loads(run(host, *arguments).stdout) == host.api.status()
    assert json.loads(run(host, "status", "phi-3-mini", "--json").stdout) == host.api.models["phi-3-mini"]


MIXED = fake_status(
    {
        "mixtral-8x7b": fake_model("mixtral-8x7b", 11400, cpus=list(range(8))),
        "hermes-2": fake_model("hermes-2", 11401, state="loading", progress="weights 45 % (120 of 269 MB)"),
        "openchat-3.5": fake_model("openchat-3.5", 11402, state="backing_off", reason="engine core died"),
        "phi-3-mini": fake_model("phi-3-mini", 11403, state="stopped", pid=None, memory_bytes=0, cpus=[]),
    }
)
NOW = SINCE + timedelta(days=3, hours=4)


def test_at_200_columns_the_table_has_everything() -> None:
    text = render.status_table(MIXED, width=200, colour=False, now=NOW)
    assert "RESTARTS" in text and "CPUS" in text and "PID" in text
    assert "loading: weights 45 % (120 of 269 MB)" in text
    assert "backing off" in text
    assert "3 d 4 h" in text


def test_at_80_columns_the_table_fits_and_the_ids_are_whole() -> None:
    text = render.status_table(MIXED, width=80, colour=False, now=NOW)
    table = text.splitlines()[2:]
    assert max(len(line) for line in table) <= 80
    for model in MIXED["models"]:
        assert any(line.startswith(model) for line in table)
    for column in ("MODEL", "STATE", "PORT", "MEMORY", "ACTIVE", "SINCE"):
        assert column in table[0]
    assert "(120 of 269 MB)" in text  # folded, on a line of its own


def test_a_terminal_too_narrow_for_an_id_still_gets_the_whole_id() -> None:
    text = render.status_table(MIXED, width=20, colour=False, now=NOW)
    for model in MIXED["models"]:
        assert model in text


def test_on_a_terminal_status_has_colour_and_fits(host: Hosted) -> None:
    text, code = run_on_terminal(host, "status", columns=80)
    assert code == 0
    assert "\x1b[32mready" in text
    assert max(len(line) for line in without_colour(text).splitlines()[2:]) <= 80


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_it_is_not_wanted(host: Hosted, variable: str, value: str) -> None:
    text, _ = run_on_terminal(host, "status", env={variable: value})
    assert "ready" in text
    assert "\x1b" not in text


def test_what_a_model_says_cannot_command_the_terminal(host: Hosted) -> None:
    host.api.models["phi-3-mini"] |= {"state": "failed", "reason": "boom\x1b]0;title\x07[bold]"}
    text, _ = run_on_terminal(host, "status", env={"NO_COLOR": "1"})
    assert r"boom\x1b]0;title\x07[bold]" in text


# start, stop, restart, drain


@pytest.mark.parametrize(
    ("arguments", "call", "told"),
    [
        (["start", "phi-3-mini"], ("start", "phi-3-mini", True), "phi-3-mini: ready in 4.2 s"),
        (["stop", "phi-3-mini"], ("stop", "phi-3-mini", True, None), "phi-3-mini: stopped"),
        (["stop", "--drain", "5", "phi-3-mini"], ("stop", "phi-3-mini", True, 5.0), "phi-3-mini: stopped"),
        (["restart", "phi-3-mini"], ("restart", "phi-3-mini", True, None), "phi-3-mini: ready in 4.2 s"),
        (["drain", "phi-3-mini"], ("drain", "phi-3-mini", True), "phi-3-mini: draining"),
        (["stop", "--no-wait", "phi-3-mini"], ("stop", "phi-3-mini", False, None), "phi-3-mini: stopping"),
    ],
)
def test_a_command_is_done_and_told(
    host: Hosted, arguments: list[str], call: tuple[Any, ...], told: str
) -> None:
    result = run(host, *arguments)
    assert (result.exit_code, result.stdout) == (0, told + "\n")
    assert host.api.calls == [call]
    host.do(host.api.calls.clear)
    data = json.loads(run(host, *arguments, "--json").stdout)
    assert data["models"]["phi-3-mini"]["port"] == 11403
    assert (data["errors"], data["skipped"]) == ({}, [])


def test_all_means_every_model_and_a_repeated_name_is_one(host: Hosted) -> None:
    assert run(host, "start", "all").exit_code == 0
    assert {call[1] for call in host.api.calls} == {"mixtral-8x7b", "phi-3-mini"}
    host.do(host.api.calls.clear)
    assert run(host, "stop", "phi-3-mini", "phi-3-mini").exit_code == 0
    assert host.api.calls == [("stop", "phi-3-mini", True, None)]
    host.do(host.api.calls.clear)
    assert run(host, "restart", "all").exit_code == 0  # not what was stopped on purpose
    assert host.api.calls == [("restart", "mixtral-8x7b", True, None)]
    assert run(host, "drain", "all").exit_code == 2


def test_one_unknown_name_and_nothing_is_done_to_any(host: Hosted) -> None:
    result = run(host, "stop", "phi-3-mini", "phi-4")
    assert result.exit_code == 4
    assert "model 'phi-4' does not exist; known: mixtral-8x7b, phi-3-mini" in result.stderr
    assert host.api.calls == []


def test_several_start_at_once(host: Hosted) -> None:
    host.do(host.api.settle.clear)
    process = start(host, "start", "all")
    while len(host.api.calls) < 2:  # the second comes although the first has not settled
        host.wait_called()
    host.do(host.api.settle.set)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == ["mixtral-8x7b: ready in 4.2 s", "phi-3-mini: ready in 4.2 s"]


def test_restart_goes_one_by_one_and_ends_at_the_first_that_fails(host: Hosted) -> None:
    host.api.ends_in["mixtral-8x7b"] = "quarantined"
    result = run(host, "restart", "all")
    assert result.exit_code == 1
    assert [call[1] for call in host.api.calls] == ["mixtral-8x7b"]
    assert "mixtral-8x7b: quarantined: checkpoint is damaged" in result.stderr
    assert "left as they were: phi-3-mini" in result.stderr
    data = json.loads(run(host, "--json", "restart", "all").stdout)
    assert data["errors"]["mixtral-8x7b"]["code"] == "failed"
    assert data["models"]["mixtral-8x7b"]["state"] == "quarantined"
    assert data["skipped"] == ["phi-3-mini"]


def test_what_is_refused_says_why_and_exits_5(host: Hosted) -> None:
    host.api.refusals["drain"] = CommandRefused(
        "model 'phi-3-mini' is stopped; only a ready one can be drained"
    )
    result = run(host, "drain", "phi-3-mini")
    assert result.exit_code == 5
    assert result.stderr == "citadelctl: model 'phi-3-mini' is stopped; only a ready one can be drained\n"
    result = run(host, "drain", "phi-3-mini", "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["errors"]["phi-3-mini"]["code"] == "refused"


def test_what_takes_too_long_exits_6_and_goes_on(host: Hosted) -> None:
    host.do(host.api.settle.clear)
    result = run(host, "start", "phi-3-mini", "--timeout", "0.2")
    assert result.exit_code == 6
    assert "not ready in time; it goes on" in result.stderr
    assert host.api.models["phi-3-mini"]["state"] == "loading"
    host.do(host.api.settle.set)


def test_progress_is_shown_on_a_terminal_while_it_waits(host: Hosted) -> None:
    host.do(host.api.settle.clear)
    host.api.models["phi-3-mini"] |= {"state": "stopped"}

    def seen(status: dict[str, Any]) -> dict[str, Any]:
        """Let the model settle once its loading has been looked at."""
        if host.api.models["phi-3-mini"]["state"] == "loading":
            host.api.settle.set()
        return status

    original = host.api.status
    host.api.status = lambda: seen(json.loads(json.dumps(original())))  # type: ignore[method-assign]
    text, code = run_on_terminal(host, "start", "phi-3-mini", columns=120)
    assert code == 0
    assert "phi-3-mini: loading: weights 45 % (120 of 269 MB)" in without_colour(text)
    assert without_colour(text).splitlines()[-1].endswith("phi-3-mini: ready in 4.2 s")


def test_piped_there_is_no_progress(host: Hosted) -> None:
    process = start(host, "start", "phi-3-mini")
    assert process.communicate(timeout=60) == ("phi-3-mini: ready in 4.2 s\n", "")


# reload, logs, events, version


def test_reload_tells_what_changed(host: Hosted) -> None:
    result = run(host, "reload")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "changed: phi-3-mini",
        "unchanged: mixtral-8x7b",
        "needs a restart: gateway",
    ]
    assert json.loads(run(host, "reload", "--json").stdout)["restart_needed"] == ["gateway"]


def test_a_refused_configuration_shows_every_problem(host: Hosted) -> None:
    host.api.refusals["reload"] = ConfigError("citadel.yaml", ["gatway: unknown", "models.x.port: too large"])
    result = run(host, "reload")
    assert result.exit_code == 1
    assert "gatway: unknown" in result.stderr and "models.x.port: too large" in result.stderr
    assert json.loads(run(host, "reload", "--json").stdout)["error"]["code"] == "failed"


def test_logs_show_the_last_lines(host: Hosted) -> None:
    (host.socket.parent / "phi-3-mini.log").write_text("a\nzwölf\nc\n")
    assert run(host, "logs", "-n", "2", "phi-3-mini").stdout == "zwölf\nc\n"
    lines = run(host, "logs", "-n", "2", "phi-3-mini", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"model": "phi-3-mini", "line": "zwölf"},
        {"model": "phi-3-mini", "line": "c"},
    ]
    assert run(host, "logs", "zygote").stdout == ""
    assert run(host, "logs", "phi-4").exit_code == 4


def test_logs_follow_what_is_appended_through_rotation_until_the_daemon_ends(host: Hosted) -> None:
    log = host.socket.parent / "phi-3-mini.log"
    log.write_text("one\ntwo\n")
    process = start(host, "logs", "-f", "-n", "1", "phi-3-mini")
    assert process.stdout is not None
    assert process.stdout.readline() == "two\n"
    with log.open("a") as file:
        file.write("three\n")
    assert process.stdout.readline() == "three\n"
    log.rename(log.with_suffix(".1"))
    log.write_text("four\n")
    assert process.stdout.readline() == "four\n"
    host.stop()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "it stopped and ended the stream" in err


def test_a_log_cannot_command_the_terminal(host: Hosted) -> None:
    (host.socket.parent / "phi-3-mini.log").write_bytes(b"10%\r20%\n\x1b[2Jboom\x9b\xff\n")
    text, _ = run_on_terminal(host, "logs", "phi-3-mini")
    assert text == "10%\n20%\n\\x1b[2Jboom��\n"


def test_events_follow(host: Hosted) -> None:
    host.do(lambda: host.api.bus.publish(Notice(level="INFO", text="hello")))
    process = start(host, "events", "-f", "--json")
    assert process.stdout is not None and process.stderr is not None
    assert json.loads(process.stdout.readline())["text"] == "hello"
    run(host, "stop", "phi-3-mini")
    audit = json.loads(process.stdout.readline())
    assert (audit["kind"], audit["action"], audit["pid"]) == ("audit", "stop", os.getpid())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_events_read_like_sentences() -> None:
    at = datetime(2026, 11, 21, 9, 0, 0, tzinfo=UTC).timestamp()
    moved = Transition(
        model="phi-3-mini",
        generation=2,
        before=WorkerState.BACKING_OFF,
        after=WorkerState.STARTING,
        reason="after 0.5 s\nnot a line",
        at=at,
    )
    ended = WorkerExited(
        model="phi-3-mini", generation=1, part="core", pid=7, status=-9, expected=False, at=at
    )
    asked = Audit(uid=0, pid=9, action="stop", target="phi-3-mini", outcome="ok", at=at)
    lines = [render.event_line(as_dict(event), colour=False) for event in (moved, ended, asked)]
    assert [line[21:] for line in lines] == [
        "phi-3-mini gen 2: backing off -> starting: after 0.5 s\\nnot a line",
        "phi-3-mini gen 1: core (pid 7) ended with signal 9, unexpected",
        "uid 0 (pid 9): stop phi-3-mini: ok",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", lines[0][:21])


def test_version_of_both(host: Hosted) -> None:
    assert run(host, "version").stdout.splitlines() == [
        "citadelctl 0.1.0",
        f"citadel-supervisor 0.1.0 (pid {os.getpid()})",
    ]
    assert json.loads(run(host, "version", "--json").stdout)["supervisor"]["pid"] == os.getpid()


# when it goes wrong


@pytest.mark.parametrize(
    "command", ["status", "start x", "stop x", "restart x", "drain x", "reload", "logs x", "events"]
)
def test_without_a_daemon_every_command_exits_3_with_a_hint(tmp_path: Path, command: str) -> None:
    socket = str(tmp_path / "control.sock")
    result = CliRunner().invoke(cli, ["--socket", socket, *command.split()])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert f"no citadel-supervisor answers on {socket}" in result.stderr
    assert "--socket" in result.stderr and "systemctl start" in result.stderr
    result = CliRunner().invoke(cli, ["--socket", socket, "--json", *command.split()])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["code"] == "unreachable"
    assert result.stderr == ""


def test_version_without_a_daemon_still_tells_its_own(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--socket", str(tmp_path / "no.sock"), "version"])
    assert (result.exit_code, result.stdout) == (3, "citadelctl 0.1.0\n")


def test_the_socket_may_come_from_the_environment(host: Hosted) -> None:
    result = CliRunner().invoke(cli, ["version"], env={"CITADEL_SOCKET": str(host.socket)})
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode"],
        ["start"],
        ["stop", "x", "--drain", "-1"],
        ["logs", "-n", "x", "m"],
        ["status", "--timeout", "0"],
    ],
)
def test_wrong_usage_exits_2(host: Hosted, arguments: list[str]) -> None:
    assert run(host, *arguments).exit_code == 2
    assert host.api.calls == []


def test_interrupted_while_it_waits_it_ends_quietly_and_the_command_goes_on(host: Hosted) -> None:
    host.do(host.api.settle.clear)
    process = start(host, "start", "phi-3-mini")
    host.wait_called()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
    host.do(host.api.settle.set)


def test_a_daemon_that_stops_meanwhile_is_told(host: Hosted) -> None:
    host.do(host.api.settle.clear)
    process = start(host, "start", "phi-3-mini")
    host.wait_called()
    host.stop()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "supervisor is stopping" in err) == (1, True)


def test_a_closed_pipe_is_no_error(host: Hosted) -> None:
    (host.socket.parent / "phi-3-mini.log").write_text("a line of a log\n" * 90_000)
    process = start(host, "logs", "-n", "90000", "phi-3-mini")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def imported_by(*arguments: str) -> set[str]:
    """The top-level modules, and our own, that a run of citadelctl imports."""
    script = (
        "import sys, click\n"
        "from citadel_supervisor.cli.commands import cli\n"
        "try:\n    cli(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    names = done.stderr.splitlines()[-1].split()
    return {name if name.startswith("citadel_supervisor") else name.partition(".")[0] for name in names}


def test_it_imports_only_what_it_needs(host: Hosted) -> None:
    helping = imported_by("--help")
    assert not helping & {"httpx", "rich", "pydantic", "asyncio"}
    working = imported_by("--socket", str(host.socket), "status")
    assert "httpx" in working
    heavy = {"uvicorn", "starlette", "vllm", "torch", "pydantic", "asyncpg", "redis", "qdrant_client"}
    assert not working & heavy
    assert not [name for name in working if name.startswith("citadel_supervisor.control.server")]


def test_help_teaches(host: Hosted) -> None:
    text = run(host, "--help").stdout
    for part in (
        "citadelctl restart phi-3-mini",
        "Exit codes:",
        "--socket",
        "_CITADELCTL_COMPLETE=bash_source",
    ):
        assert part in text
    for command in ("status", "start", "stop", "restart", "drain", "reload", "logs", "events", "version"):
        assert "--json" in run(host, command, "--help").stdout


def test_completion_knows_the_models(host: Hosted) -> None:
    environment = os.environ | {
        "_CITADELCTL_COMPLETE": "bash_complete",
        "CITADEL_SOCKET": str(host.socket),
        "COMP_WORDS": "citadelctl stop ph",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        CITADELCTL, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "plain,phi-3-mini"
