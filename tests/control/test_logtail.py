"""The end of a log and what is appended to it: right to the byte, through rotation, never the whole file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from citadel_supervisor.control.logtail import LogFollower, stream_log, tail_offset


@example(lines=[b"a", b"b" * 65_535], ended=True, wanted=1, big=45)  # a line begins with a block
@given(
    lines=st.lists(st.binary(max_size=300).map(lambda line: line.replace(b"\n", b"")), max_size=40),
    ended=st.booleans(),
    wanted=st.integers(0, 45),
    big=st.integers(0, 45),
)
def test_the_tail_is_the_last_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, wanted: int, big: int
) -> None:
    if big < len(lines):
        lines[big] = b"x" * 70_000  # longer than a block
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.getbasetemp() / "tail.log"
    path.write_bytes(data)
    expected = b"".join(data.splitlines(keepends=True)[-wanted:]) if wanted else b""
    if b"\r" not in data:  # splitlines() would also split there
        with FileIO(path) as file:
            assert data[tail_offset(file, wanted) :] == expected


def test_the_tail_of_a_huge_file_does_not_read_it_all(tmp_path: Path) -> None:
    path = tmp_path / "huge.log"
    with path.open("wb") as file:
        file.truncate(200 * 1024**3)  # sparse; reading it would take minutes
        file.seek(0, os.SEEK_END)
        file.write(b"\none\ntwo\nthree\n")
    follower = LogFollower(path, 2)
    assert follower.read() == b"two\nthree\n"
    follower.close()


def follow(path: Path, lines: int, stopping: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    return stream_log(path, lines=lines, follow=True, stopping=stopping or asyncio.Event(), poll_s=0.01)


async def test_it_follows_what_is_appended_through_rotation(tmp_path: Path) -> None:
    path = tmp_path / "phi.log"
    path.write_text("a\nb\n")
    async with aclosing(follow(path, 1)) as parts:  # type: ignore[type-var]
        assert await anext(parts) == b"b\n"
        with path.open("a") as file:
            file.write("c\n")
        assert await anext(parts) == b"c\n"
        with path.open("a") as file:
            file.write("last of the old\n")
        path.rename(tmp_path / "phi.log.1")
        path.write_text("first of the new\n")
        seen = await anext(parts)
        while not seen.endswith(b"new\n"):
            seen += await anext(parts)
        assert seen == b"last of the old\nfirst of the new\n"


async def test_a_file_cut_in_place_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "phi.log"
    path.write_text("something long\n")
    async with aclosing(follow(path, 1)) as parts:  # type: ignore[type-var]
        assert await anext(parts) == b"something long\n"
        path.write_text("new\n")
        assert await anext(parts) == b"new\n"


def test_a_file_that_comes_later_is_read_from_its_start(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path / "phi.log", 1)
    assert follower.read() == b""
    (tmp_path / "phi.log").write_text("one\ntwo\n")
    assert follower.read() == b"one\ntwo\n"
    follower.close()


def test_what_is_written_last_before_a_rotation_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written to and rotated after it was read to its end, before its name is looked at."""
    path = tmp_path / "phi.log"
    path.write_text("a\n")
    follower = LogFollower(path, 1)
    assert follower.read() == b"a\n"
    real_stat = os.stat

    def rotate_first(name: Path) -> os.stat_result:
        monkeypatch.undo()
        with path.open("a") as file:
            file.write("b\n")
        path.rename(tmp_path / "phi.log.1")
        path.write_text("c\n")
        return real_stat(name)

    monkeypatch.setattr("citadel_supervisor.control.logtail.os.stat", rotate_first)
    assert follower.read() + follower.read() == b"b\nc\n"
    follower.close()


async def test_following_ends_when_told(tmp_path: Path) -> None:
    path = tmp_path / "phi.log"
    path.write_text("a\n")
    stopping = asyncio.Event()
    parts = follow(path, 5, stopping)
    assert await anext(parts) == b"a\n"
    stopping.set()
    assert [part async for part in parts] == []


async def test_without_follow_it_ends_at_the_end_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "phi.log"

    async def tail() -> bytes:
        parts = stream_log(path, lines=2, follow=False, stopping=asyncio.Event(), poll_s=60)
        return b"".join([part async for part in parts])

    assert await tail() == b""
    path.write_bytes(b"a\nb\nc")
    assert await tail() == b"b\nc"
