from __future__ import annotations

import asyncio
import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from citadel_supervisor.config import LogSettings
from citadel_supervisor.errors import StartError
from citadel_supervisor.events import Audit, Notice, RequestDone, Transition, WorkerExited
from citadel_supervisor.observe.logging import EngineLines, log_event, set_up_logging
from citadel_supervisor.states import WorkerState as S

SetUp = Callable[..., io.StringIO]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SetUp]:
    """Logging as the daemon has it, to `tmp_path`; what it writes to standard error is returned."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)

    def set_up(journal: bool = False, terminal: bool = False, **settings: Any) -> io.StringIO:
        stream = io.StringIO()
        if terminal:
            monkeypatch.setattr(stream, "isatty", lambda: True)
        if journal:
            monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            set_up_logging(LogSettings.model_validate(settings), tmp_path, ["phi", "hermes"])
        return stream

    yield set_up
    logger.remove()
    logger.add(sys.stderr, diagnose=False, backtrace=False)


def own_lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "supervisor.log").read_text().splitlines()]


def test_the_daemons_lines_go_to_standard_error_and_as_json_to_its_file(
    set_up: SetUp, tmp_path: Path
) -> None:
    stream = set_up()
    logger.bind(model="phi", generation=3, pid=12).warning("the {} is late", "engine")
    logger.debug("not written")
    (line,) = stream.getvalue().splitlines()
    assert line.split(None, 1)[1].split() == ["WARNING", "phi", "the", "engine", "is", "late"]
    (data,) = own_lines(tmp_path)
    time = datetime.datetime.fromisoformat(data.pop("time"))
    assert time.tzinfo is not None and abs(time.timestamp() - datetime.datetime.now().timestamp()) < 60
    assert data == {
        "level": "WARNING", "message": "the engine is late", "model": "phi", "generation": 3, "pid": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    "hostile",
    [
        "two\nlines",
        "\r\nlevel: forged",
        "\x1b[31mred\x1b[0m",
        "nul \0 here",
        "\u2028",
        "half \udc80 a character",
    ],
)
def test_whatever_is_in_a_message_it_stays_one_line(set_up: SetUp, tmp_path: Path, hostile: str) -> None:
    stream = set_up()
    logger.bind(model="phi", why=hostile).info("{}", hostile)
    logger.info("next")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].isprintable()
    raw = (tmp_path / "supervisor.log").read_bytes().split(b"\n")
    assert len(raw) == 3 and raw[2] == b""
    assert b"\x1b" not in raw[0] and b"\0" not in raw[0] and b"\r" not in raw[0]
    assert json.loads(raw[0])["message"] == json.loads(raw[0])["why"] == hostile


def test_an_exception_is_one_line_and_its_trace_is_in_the_file(set_up: SetUp, tmp_path: Path) -> None:
    stream = set_up()

    def deep_inside() -> None:
        raise ValueError("no good") if secret else AssertionError

    secret = os.urandom(8).hex()
    try:
        deep_inside()
    except ValueError:
        logger.exception("a step failed")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("a step failed (ValueError('no good'); the stack trace is in supervisor.log)")
    (data,) = own_lines(tmp_path)
    assert data["exception"] == "ValueError('no good')"
    assert "deep_inside" in data["trace"] and "test_logging.py" in data["trace"]
    assert secret not in json.dumps(data), "the values of variables are not"


def test_json_lines_for_those_who_collect_them(set_up: SetUp) -> None:
    stream = set_up(json_lines=True)
    logger.bind(part="zygote").info("hello")
    data = json.loads(stream.getvalue())
    assert (data["message"], data["part"], data["level"]) == ("hello", "zygote", "INFO")


def test_the_journal_gets_priorities_and_no_times_of_ours(set_up: SetUp) -> None:
    stream = set_up(journal=True)
    logger.bind(model="phi").error("lost")
    logger.success("ready")
    logger.bind(engine="phi").warning("an engine's line")
    assert stream.getvalue().splitlines() == [
        "<3>phi: lost", "<6>supervisor: ready", "<4>phi: an engine's line",
    ]  # fmt: skip


def test_colour_is_for_terminals_that_want_it(set_up: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = set_up(terminal=True)
    logger.error("red")
    assert "\x1b[31m" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = set_up(terminal=True)
    logger.error("plain")
    assert "\x1b" not in plain.getvalue()


def test_the_level_is_obeyed(set_up: SetUp, tmp_path: Path) -> None:
    stream = set_up(level="WARNING")
    logger.info("no")
    logger.bind(engine="phi").info("no")
    logger.warning("yes")
    assert stream.getvalue().count("\n") == 1 and len(own_lines(tmp_path)) == 1
    assert (tmp_path / "phi.log").read_text() == ""


def test_a_closed_standard_error_stops_nothing(set_up: SetUp, tmp_path: Path) -> None:
    stream = set_up()
    stream.close()
    logger.info("still kept")
    assert own_lines(tmp_path)[0]["message"] == "still kept"


async def written(directory: Path, name: str, lines: int) -> list[str]:
    """The engine's file once it has so many lines."""
    async with asyncio.timeout(5):
        while len(found := (directory / f"{name}.log").read_text().splitlines()) < lines:
            await asyncio.sleep(0)
    return found


async def test_what_an_engine_prints_goes_to_its_own_file_only(set_up: SetUp, tmp_path: Path) -> None:
    stream = set_up()
    engines = EngineLines()
    phi, hermes = await engines.open("phi"), await engines.open("hermes")
    os.write(phi, b"INFO 11-21 weights {braces} <red>markup</red>\npart")
    os.write(hermes, b"not \xff text\n\n   \n")
    os.write(phi, b" of a line\n")
    os.close(phi)
    os.close(hermes)
    assert await written(tmp_path, "phi", 2) == [
        "INFO 11-21 weights {braces} <red>markup</red>",
        "part of a line",
    ]
    assert await written(tmp_path, "hermes", 1) == ["not \\xff text"]
    assert stream.getvalue() == "" and own_lines(tmp_path) == [], "a terminal is spared it"


async def test_the_level_of_an_engines_line_is_the_one_it_names(set_up: SetUp) -> None:
    stream = set_up(journal=True)
    descriptor = await EngineLines().open("phi")
    os.write(descriptor, b"WARNING 11-21 [x.py] slow\n(EngineCore) ERROR 11-21 lost\nno level here\n")
    os.close(descriptor)
    async with asyncio.timeout(5):
        while stream.getvalue().count("\n") < 3:
            await asyncio.sleep(0)
    assert [line[:3] for line in stream.getvalue().splitlines()] == ["<4>", "<3>", "<6>"]


def test_a_full_file_is_rotated_and_nothing_is_lost(set_up: SetUp, tmp_path: Path) -> None:
    set_up(max_file=1000)
    for number in range(30):
        logger.bind(engine="phi").info("line {:03} {}", number, "x" * 90)
    files = sorted(tmp_path.glob("phi*.log"))
    assert len(files) == 3 and all(file.stat().st_size <= 1000 for file in files)
    numbers = [int(line.split()[1]) for file in files for line in file.read_text().splitlines()]
    assert sorted(numbers) == list(range(30))
    assert len(list(tmp_path.glob("hermes*.log"))) == 1


def test_yesterdays_file_is_rotated_by_the_first_line_of_today(set_up: SetUp, tmp_path: Path) -> None:
    old = tmp_path / "phi.log"
    old.write_text("yesterday\n")
    yesterday = datetime.datetime.now().timestamp() - 86_400
    os.utime(old, (yesterday, yesterday))
    (tmp_path / "hermes.log").write_text("today\n")
    set_up()
    for name in ("phi", "hermes"):
        logger.bind(engine=name).info("now")
    assert (tmp_path / "phi.log").read_text() == "now\n"
    assert (tmp_path / "hermes.log").read_text() == "today\nnow\n"
    assert sorted(file.read_text() for file in tmp_path.glob("phi.*.log")) == ["yesterday\n"]


def test_files_older_than_they_are_kept_are_deleted(set_up: SetUp, tmp_path: Path) -> None:
    ancient = tmp_path / "phi.2020-01-01_00-00-00_000000.log"
    recent = tmp_path / "phi.2026-01-01_00-00-00_000000.log"
    for file, age_days in ((ancient, 31), (recent, 29)):
        file.write_text("old")
        at = datetime.datetime.now().timestamp() - age_days * 86_400
        os.utime(file, (at, at))
    set_up(max_file=100, keep_days=30)
    for _ in range(3):
        logger.bind(engine="phi").info("x" * 90)
    assert not ancient.exists() and recent.exists()


def test_a_directory_that_cannot_be_written_is_a_start_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"cannot write logs to .*file/logs: Not a directory; set log_dir"):
        set_up_logging(LogSettings(), tmp_path / "file" / "logs", [])


def test_events_have_lines_operators_understand(set_up: SetUp, tmp_path: Path) -> None:
    set_up()
    request = {
        "request_id": "req-1", "model": "phi", "endpoint": "/v1/completions", "duration_s": 1.234,
        "first_byte_s": None, "generation": 1, "attempts": 2, "streamed": False,
    }  # fmt: skip
    for event in (
        Transition(model="phi", generation=2, before=S.LOADING, after=S.FAILED, reason="hung: no token"),
        Transition(model="phi", generation=2, before=S.VERIFYING, after=S.READY, reason="fine"),
        Transition(model="phi", generation=2, before=S.STARTING, after=S.LOADING),
        WorkerExited(model="phi", generation=2, part="API", pid=7, status=-9, expected=False),
        WorkerExited(model="phi", generation=2, part="API", pid=7, status=0, expected=True),
        RequestDone(status=503, **request),  # type: ignore[arg-type]
        RequestDone(status=200, **request),  # type: ignore[arg-type]
        RequestDone(status=499, **request),  # type: ignore[arg-type]
        Audit(uid=0, pid=1, action="stop", target="phi", outcome="ok"),
        Notice(level="WARNING", text="disk {full}", model="phi"),
    ):
        log_event(event)
    seen = [(data["level"], data["message"]) for data in own_lines(tmp_path)]
    assert seen == [
        ("ERROR", "failed: hung: no token"),
        ("SUCCESS", "ready: fine"),
        ("INFO", "loading"),
        ("WARNING", "API 7 ended unasked"),
        ("WARNING", "/v1/completions was answered with 503 after 1.23 s, attempts 2"),
        ("WARNING", "disk {full}"),
    ]
    assert own_lines(tmp_path)[4]["request_id"] == "req-1"
    assert all(data["model"] == "phi" for data in own_lines(tmp_path))
