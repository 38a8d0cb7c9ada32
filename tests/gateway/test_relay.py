"""Relaying: the bytes, the moments at which they pass, and the headers."""

from __future__ import annotations

import json

from tests.gateway.conftest import Rig

CHAT = "/v1/chat/completions"


async def test_a_request_and_its_answer_pass_byte_for_byte(rig: Rig) -> None:
    body = json.dumps({"model": "alpha", "x": "日本語 \u0000 ünïcode"}, ensure_ascii=False).encode()
    client = await rig.client()
    client.post(CHAT + "?a=b%20c", body)
    call = await rig.engine.call()
    assert (call.method, call.target, call.body) == (b"POST", CHAT.encode() + b"?a=b%20c", body)
    reply = b'{"answer": "\xe6\x97\xa5", "odd":   "spacing"}'
    call.reply(200, reply)
    answer = await client.answer()
    assert (answer.status, answer.body, answer.whole) == (200, reply, True)
