from __future__ import annotations

import asyncio
import os

import pytest

from citadel_supervisor.workers.lines import LINE_MAX, read_lines
from tests.workers.rig import SECONDS


async def lines_of(*writes: bytes) -> list[bytes]:
    """The lines that come out when these pieces go in."""
    reading, writing = os.pipe()
    seen: list[bytes] = []
    over = asyncio.Event()
    await read_lines(reading, seen.append, over.set)
    for piece in writes:
        await asyncio.to_thread(os.write, writing, piece)
    os.close(writing)
    async with asyncio.timeout(SECONDS):
        await over.wait()
    return seen


@pytest.mark.parametrize(
    ("writes", "lines"),
    [
        ([], []),
        ([b"one\ntwo\n"], [b"one", b"two"]),
        ([b"on", b"e\ntw", b"o\n"], [b"one", b"two"]),
        ([b"the last has no end"], [b"the last has no end"]),
        ([b"\n\na\n\n"], [b"a"]),
        ([b"not \xff text\n"], [b"not \xff text"]),
    ],
)
async def test_lines(writes: list[bytes], lines: list[bytes]) -> None:
    assert await lines_of(*writes) == lines


async def test_a_line_without_end_is_cut_and_memory_stays_bounded() -> None:
    pieces = [b"x" * 50_000] * 20
    seen = await lines_of(*pieces, b"\nafter\n")
    assert seen[-1] == b"after"
    assert b"".join(seen[:-1]) == b"x" * 1_000_000
    assert max(len(line) for line in seen) <= LINE_MAX


async def test_a_line_longer_than_a_piece_is_cut_even_if_it_comes_whole() -> None:
    seen = await lines_of(b"y" * (LINE_MAX + 10) + b"\n")
    assert [len(line) for line in seen] == [LINE_MAX, 10]
