"""The upstream side alone: framing, connections kept and dropped, and how it fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from citadel_supervisor.errors import UpstreamLost, UpstreamRefused
from citadel_supervisor.gateway.exchange import MOST_UNREAD, Exchange
from citadel_supervisor.gateway.upstream import UpstreamPool
from tests.fake_upstream import SECONDS, Call, FakeUpstream, full_queue, until


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream(str(tmp_path / "engine.sock")) as engine:
        yield engine


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    pool = UpstreamPool()
    yield pool
    pool.close()
    await asyncio.sleep(0)


def post(pool: UpstreamPool, engine: FakeUpstream, body: bytes = b"{}", method: bytes = b"POST") -> Exchange:
    return pool.send(engine.path, method, b"/x", [(b"a", b"b")], body)


async def whole(exchange: Exchange) -> bytes:
    """The rest of the body."""
    data = b""
    async with asyncio.timeout(SECONDS):
        while part := await exchange.read():
            data += part
    assert exchange.done
    return data


async def started(exchange: Exchange) -> Exchange:
    async with asyncio.timeout(SECONDS):
        await exchange.start()
    return exchange


async def test_a_request_carries_its_headers_host_and_length(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    exchange = post(pool, engine, b"12345")
    call = await engine.call()
    assert (call.method, call.target, call.body) == (b"POST", b"/x", b"12345")
    assert sorted(call.headers) == [(b"a", b"b"), (b"content-length", b"5"), (b"host", b"localhost")]
    call.reply(201, b"made", [(b"X-Odd", b"1")])
    await started(exchange)
    assert exchange.status == 201
    assert (b"x-odd", b"1") in exchange.headers
    assert await whole(exchange) == b"made"


async def test_line_breaks_cannot_be_smuggled_in(pool: UpstreamPool, engine: FakeUpstream) -> None:
    for value in (b"1\r\nx: 2", b"1\nx: 2", b"1\rx: 2"):
        with pytest.raises(ValueError, match="line break"):
            pool.send(engine.path, b"POST", b"/", [(b"a", value)], b"")


async def test_chunks_are_handed_over_as_they_come(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.head(200, chunked=True)
    await started(exchange)
    for part in (b"one", b"two\r\n", b"\xe6", b"\x97\xa5"):
        call.chunk(part)
        async with asyncio.timeout(SECONDS):
            assert await exchange.read() == part
        assert not exchange.done
    call.end()
    assert await whole(exchange) == b""
    assert pool.idle(engine.path) == 1


async def test_a_large_body_arrives_whole_both_ways(pool: UpstreamPool, engine: FakeUpstream) -> None:
    body = os.urandom(5_000_000)
    exchange = post(pool, engine, body)
    call = await engine.call()
    assert call.body == body
    call.reply(200, body)
    assert await whole(await started(exchange)) == body
    assert pool.idle(engine.path) == 1


async def test_a_body_can_end_with_the_connection(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.head(200)
    call.chunk(b"until the end")
    call.die()
    assert await whole(await started(exchange)) == b"until the end"
    assert pool.idle(engine.path) == 0


@pytest.mark.parametrize("status", [204, 304])
async def test_some_statuses_have_no_body(pool: UpstreamPool, engine: FakeUpstream, status: int) -> None:
    exchange = post(pool, engine)
    (await engine.call()).head(status)
    assert await whole(await started(exchange)) == b""
    assert pool.idle(engine.path) == 1


async def test_interim_answers_are_skipped(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
    call.reply(200, b"final")
    await started(exchange)
    assert exchange.status == 200
    assert b"link" not in dict(exchange.headers)
    assert await whole(exchange) == b"final"
    assert pool.idle(engine.path) == 1


async def test_an_answer_to_head_has_no_body_whatever_it_says(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    exchange = post(pool, engine, b"", b"HEAD")
    (await engine.call()).head(200, [(b"Content-Length", b"100")])
    assert await whole(await started(exchange)) == b""


async def test_a_connection_is_used_again(pool: UpstreamPool, engine: FakeUpstream) -> None:
    for n in range(3):
        exchange = post(pool, engine, b"%d" % n)
        (await engine.call()).reply(200, b"answer %d" % n)
        assert await whole(await started(exchange)) == b"answer %d" % n
    assert engine.connections == 1


async def test_one_marked_for_closing_is_not(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.reply(200, b"x", [(b"Connection", b"close")])
    assert await whole(await started(exchange)) == b"x"
    await call.gone()
    assert pool.idle(engine.path) == 0


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", b"garbage"])
async def test_bytes_after_an_answer_spoil_the_connection_only(
    pool: UpstreamPool, engine: FakeUpstream, garbage: bytes
) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood" + garbage)
    assert await whole(await started(exchange)) == b"good"
    await call.gone()
    assert pool.idle(engine.path) == 0


async def test_bytes_on_an_idle_connection_close_it(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.reply(200, b"x")
    await whole(await started(exchange))
    call.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await call.gone()
    assert pool.idle(engine.path) == 0


async def test_the_engines_death_in_the_middle_is_a_loss(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.head(200, chunked=True)
    call.chunk(b"begun")
    call.die()
    await started(exchange)
    assert await exchange.read() == b"begun"
    with pytest.raises(UpstreamLost):
        await exchange.read()
    assert not exchange.done


async def test_too_short_a_body_is_a_loss(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    call.head(200, [(b"Content-Length", b"10")])
    call.chunk(b"short")
    call.die()
    with pytest.raises(UpstreamLost):
        await whole(await started(exchange))


async def test_no_answer_on_a_new_connection_is_a_loss(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    (await engine.call()).die()
    with pytest.raises(UpstreamLost):
        await started(exchange)
    assert engine.requests == 1


async def test_what_is_not_http_is_a_loss(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    (await engine.call()).raw(b"220 mail.example.org ESMTP\r\n")
    with pytest.raises(UpstreamLost, match="not valid HTTP"):
        await started(exchange)


async def test_a_missing_socket_is_refused(pool: UpstreamPool, tmp_path: Path) -> None:
    with pytest.raises(UpstreamRefused, match=r"nobody\.sock"):
        await started(pool.send(str(tmp_path / "nobody.sock"), b"POST", b"/", [], b""))


async def test_nobody_listening_is_refused(pool: UpstreamPool, engine: FakeUpstream, tmp_path: Path) -> None:
    await engine.stop()
    with pytest.raises(UpstreamRefused):
        await started(post(pool, engine))
    with pytest.raises(UpstreamRefused, match=r"127\.0\.0\.1:1"):
        await started(pool.send("127.0.0.1:1", b"POST", b"/", [], b""))


async def test_tcp_addresses_work_too(pool: UpstreamPool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"yes" if b"\r\nhost: 127.0.0.1:" in head else b"no"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        assert await whole(await started(pool.send(f"{host}:{port}", b"POST", b"/", [], b""))) == b"yes"


async def test_a_full_queue_of_connections_is_waited_for(tmp_path: Path) -> None:
    pool = UpstreamPool()
    async with FakeUpstream(str(tmp_path / "engine.sock"), backlog=1) as engine:
        engine.answer = lambda call: call.reply(200, call.body)
        exchanges = [post(pool, engine, b"%d" % n) for n in range(50)]
        assert [await whole(await started(exchange)) for exchange in exchanges] == [
            b"%d" % n for n in range(50)
        ]
    pool.close()


class Stale:
    """One idle connection, which the engine has closed or closes now."""

    @staticmethod
    async def make(pool: UpstreamPool, engine: FakeUpstream) -> Call:
        exchange = post(pool, engine)
        call = await engine.call()
        call.reply(200, b"first")
        await whole(await started(exchange))
        return call


async def test_a_connection_closed_while_idle_is_not_used(pool: UpstreamPool, engine: FakeUpstream) -> None:
    (await Stale.make(pool, engine)).die()
    await until(lambda: not pool.idle(engine.path))
    exchange = post(pool, engine)
    (await engine.call()).reply(200, b"second")
    assert await whole(await started(exchange)) == b"second"


async def test_a_connection_closed_as_the_request_goes_out_is_replaced_unseen(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    (await Stale.make(pool, engine)).die()
    exchange = post(pool, engine, b"again")  # before this loop can see the close
    call = await engine.call()
    assert call.body == b"again"
    call.reply(200, b"second")
    assert await whole(await started(exchange)) == b"second"
    assert engine.requests == 2


async def test_a_kept_connection_cut_before_its_answer_is_replaced_once(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    await Stale.make(pool, engine)
    exchange = post(pool, engine)
    (await engine.call()).die()
    (await engine.call()).die()
    with pytest.raises(UpstreamLost):
        await started(exchange)
    assert engine.requests == 3


async def test_a_kept_connection_cut_within_its_answer_is_not_replaced(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    await Stale.make(pool, engine)
    exchange = post(pool, engine)
    call = await engine.call()
    call.raw(b"HTTP/1.1 2")
    call.die()
    with pytest.raises(UpstreamLost):
        await started(exchange)
    assert engine.requests == 2


async def test_forgetting_closes_idle_connections_and_later_the_busy_ones(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    busy = post(pool, engine)
    call = await engine.call()
    idle = await Stale.make(pool, engine)
    pool.forget(engine.path)
    await idle.gone()
    call.reply(200, b"late")
    assert await whole(await started(busy)) == b"late"
    await call.gone()
    assert pool.idle(engine.path) == 0


async def test_only_so_many_connections_stay_idle(engine: FakeUpstream) -> None:
    pool = UpstreamPool(max_idle=2)
    exchanges = [post(pool, engine) for _ in range(4)]
    for _ in exchanges:
        (await engine.call()).reply(200, b"x")
    for exchange in exchanges:
        await whole(await started(exchange))
    assert pool.idle(engine.path) == 2
    pool.close()
    assert pool.idle(engine.path) == 0


async def test_abort_closes_the_connection_at_once(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    exchange.abort()
    await call.gone()
    with pytest.raises(UpstreamLost):
        await exchange.start()


async def test_abort_wakes_the_reader_and_ends_connecting(pool: UpstreamPool, tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    with full_queue(path):
        exchange = pool.send(path, b"POST", b"/", [], b"")
        waiting = asyncio.create_task(exchange.start())
        await asyncio.sleep(0)
        exchange.abort()
        with pytest.raises(UpstreamLost):
            await waiting
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_connecting_is_given_up_after_a_while(tmp_path: Path) -> None:
    pool = UpstreamPool(connect_timeout_s=0.05)
    path = str(tmp_path / "full.sock")
    with full_queue(path), pytest.raises(UpstreamRefused, match="no answer"):
        await started(pool.send(path, b"POST", b"/", [], b""))
    pool.close()


async def test_abort_after_the_end_keeps_the_connection(pool: UpstreamPool, engine: FakeUpstream) -> None:
    exchange = post(pool, engine)
    (await engine.call()).reply(200, b"x")
    await whole(await started(exchange))
    exchange.abort()
    assert pool.idle(engine.path) == 1


async def test_an_answer_nobody_reads_is_not_taken_without_bound(
    pool: UpstreamPool, engine: FakeUpstream
) -> None:
    exchange = post(pool, engine)
    call = await engine.call()
    size = 64 * MOST_UNREAD
    call.reply(200, b"x" * size)
    await started(exchange)
    await until(lambda: exchange.unread > MOST_UNREAD)
    for _ in range(100):
        await asyncio.sleep(0)
    assert exchange.unread < 4 * MOST_UNREAD
    assert not call.connection.flowing.is_set()
    assert len(await whole(exchange)) == size
    assert pool.idle(engine.path) == 1


async def test_an_early_answer_stops_the_sending(pool: UpstreamPool, tmp_path: Path) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        while await reader.read(1):
            pass
        writer.close()

    path = str(tmp_path / "refusing.sock")
    async with await asyncio.start_unix_server(refuse, path, limit=2**10):
        exchange = pool.send(path, b"POST", b"/", [], bytes(16_000_000))
        assert await whole(await started(exchange)) == b"no"
        assert exchange.status == 413
        assert pool.idle(path) == 0
