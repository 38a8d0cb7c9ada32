"""Holding back the unfinished end of a stream of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citadel_supervisor.gateway.sse import LONGEST_EVENT, EventHold

EVENTS = [b"data: 1\n\n", b": ping\r\n\r\n", b"event: x\ndata: \xe6\x97\xa5\n\n", b"data: [DONE]\n\n"]


@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.binary(max_size=5), st.data())
def test_however_it_is_cut_nothing_is_lost_and_nothing_passes_early(
    events: list[bytes], rest: bytes, data: st.DataObject
) -> None:
    whole = b"".join(events)
    stream = whole + rest
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    hold = EventHold()
    passed = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out = hold.feed(stream[start:end])
        assert out == b"" or out.endswith((b"\n\n", b"\r\n\r\n"))
        passed += out
    assert len(passed) >= len(whole)
    assert passed + hold.rest() == stream
    assert not hold.torn


def test_an_event_without_end_passes_in_the_end() -> None:
    hold = EventHold()
    assert hold.feed(b"x" * LONGEST_EVENT) == b""
    assert hold.feed(b"x") == b"x" * (LONGEST_EVENT + 1)
    assert hold.torn
    assert hold.rest() == b""


@pytest.mark.parametrize(
    ("events", "over"),
    [
        (b"", False),
        (b"data: 1\n\n", False),
        (b"data: 1\n\ndata: [DONE]\n\n", True),
        (b"data: 1\r\n\r\ndata: [DONE]\r\n\r\n", True),
        (b"data: [DONE]\n\ndata: 1\n\n", False),
        (b'data: {"text": "data: [DONE]"}\n\n', False),
        (b'data: {"text": "\\n\\ndata: [DONE]"}\n\n', False),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (b"event: response.completed\ndata: {}\n\n", True),
        (b"event: response.failed\ndata: {}\n\n", True),
        (b"event: response.output_text.delta\ndata: {}\n\n", False),
        (b'data: 1\n\ndata: {"error": {}}\n\n', True),
        (b"event: error\ndata: {}\n\n", True),
    ],
)
def test_whether_the_last_word_was_said(events: bytes, over: bool) -> None:
    hold = EventHold()
    hold.feed(events)
    assert hold.over is over


def test_the_next_sequence_number_follows_the_last_one_passed_on() -> None:
    hold = EventHold()
    assert hold.next_sequence == 0
    hold.feed(b'data: {"sequence_number":7}\n\ndata: {"sequence_number": 8}\n\n')
    hold.feed(b'data: {"sequence_number":9}')
    assert hold.next_sequence == 9
