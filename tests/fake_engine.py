"""A stand-in for the engine: real processes, the real interface, nothing computed.

The supervisor spawns it in place of an interpreter: a model's `python:` names a wrapper (the fixture
`fake_engine` writes one) that runs this file whatever `-m MODULE` says. From then on it is an engine to
the supervisor: reports on descriptor 3, an API process with an engine core below it, HTTP on the unix
socket. It is ready within 0.2 s and answers with `FAKE_TEXT`'s words, one a token, over and over.

It serves /health, /metrics, /v1/models, /tokenize, /v1/completions and /v1/chat/completions (both also
streaming). Its faults are switched on by the model's `env:`. A value may end in "@N": then it holds for
generation N only, for instance FAKE_EXIT_AT_START=70@1 for a worker that recovers by being restarted.

    FAKE_GATE=FIFO           each phase of loading waits for a byte of this FIFO
    FAKE_TOKENS=FIFO         each token waits for a byte of this FIFO, after those of FAKE_FREE_TOKENS
    FAKE_FREE_TOKENS=N       ...which come at once in each request (0)
    FAKE_TEXT=WORDS          what it says ("The capital of France is Paris .")
    FAKE_SLOW_START=S        loads for S seconds
    FAKE_EXIT_AT_START=CODE  exits with CODE after its first report
    FAKE_FATAL=TEXT          reports that it can never start, and exits with 78
    FAKE_TROUBLE=TEXT        reports a failure that may pass, and exits with 70
    FAKE_CRASH_IN=PHASE      its core is killed in that phase: weights, kv_cache or warm_up; its API
                             process in the known-answer check: check
    FAKE_CRASH_AFTER_S=S     its core is killed S seconds after it became ready
    FAKE_CRASH_REQUEST=N     its core is killed by the N-th request
    FAKE_CRASH_TOKEN=N       its core is killed when a request has got N tokens
    FAKE_HANG=N              a request stops at N tokens; its core waits for ever
    FAKE_BUSY=N              a request stops at N tokens; its core computes for ever
    FAKE_DEAF=PATH           never answers requests for this path
    FAKE_IGNORE_SIGTERM=1    as it says
    FAKE_FORK_CHILDREN=N     N children that ignore SIGTERM, lead sessions of their own and outlive parents
    FAKE_STRAY_CHILDREN=N    the same, with a parent that has ended already
    FAKE_SURVIVE=1           neither process dies with its parent
    FAKE_WRONG_ANSWER=NATS   log-probabilities are off by so much
    FAKE_NAN=1               log-probabilities are not numbers
    FAKE_DRIFT=1             log-probabilities differ from call to call
    FAKE_TOKENIZER=other     splits text into characters, not words
    FAKE_REFUSE=STATUS       answers every completion with this status
    FAKE_NO_HELLO=1          reports nothing
    FAKE_GARBAGE_REPORTS=1   writes lines to the status pipe that are no reports
    FAKE_BAD_METRICS=1       /metrics holds no numbers
    FAKE_LITTER=1            leaves files in its scratch directory
    FAKE_MEMORY=BYTES        its core holds so much; FAKE_MEMORY_GROWTH=BYTES: so much more a request

For tests, directly on its socket: GET /fake/state is its counters as JSON, and GET /fake/wait?NAME=N
answers with them once the counter has reached N. Counters: requests, running, finished, aborted (the
client left first), tokens, health, metrics (times asked).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
import zlib
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

import setproctitle

from citadel_supervisor.workers import parentage

STATUS_FD = 3
WEIGHTS = 1000
DEFAULT_TEXT = "The capital of France is Paris ."


def split(text: str, tokenizer: str = "words") -> list[int]:
    """How the fake tokenizes: a number for each word."""
    parts = list(text) if tokenizer == "other" else text.split()
    return [zlib.crc32(part.encode()) % 50_000 for part in parts]


def logprobs(token_ids: list[int]) -> list[float]:
    """What the fake answers for each token but the first: fixed numbers below 0."""
    return [-1.0 - token_id % 400 / 100 for token_id in token_ids[1:]]


class Flags:
    """The faults of this generation."""

    def __init__(self, generation: int) -> None:
        self._generation = generation

    def text(self, name: str) -> str:
        """The flag's value, "" when it is off."""
        value, _, generation = os.environ.get(f"FAKE_{name}", "").partition("@")
        return value if not generation or int(generation) == self._generation else ""

    def number(self, name: str, default: float = 0) -> float:
        return float(self.text(name) or default)


def report(**fields: Any) -> None:
    """One line on the status pipe."""
    with contextlib.suppress(OSError):
        os.write(STATUS_FD, json.dumps(fields).encode() + b"\n")


def kill_self() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit  # never reached


class Core:
    """The engine core: "loads", then makes tokens for the requests that the API process sends."""

    def __init__(self, channel: socket.socket, flags: Flags) -> None:
        self._channel = channel
        self._flags = flags
        self._held = [os.urandom(1) * int(flags.number("MEMORY"))]
        self._requests = 0
        self._active: dict[int, list[int]] = {}
        """By request: tokens made, tokens wanted."""
        gate = flags.text("TOKENS")
        self._gate = os.open(gate, os.O_RDWR) if gate else -1
        self._free = int(flags.number("FREE_TOKENS")) if gate else sys.maxsize

    def run(self, title: str) -> NoReturn:
        setproctitle.setproctitle(title)
        report(report="core", pid=os.getpid())
        gate = self._flags.text("GATE")
        entrance = os.open(gate, os.O_RDWR) if gate else -1
        for phase, done in (("weights", 0), ("weights", WEIGHTS), ("kv_cache", 0), ("warm_up", 0)):
            if entrance >= 0:
                os.read(entrance, 1)
            report(report="loading", phase=phase, done=done, total=WEIGHTS if phase == "weights" else 0)
            if self._flags.text("CRASH_IN") == phase:
                kill_self()
        self._channel.send(b"loaded\n")
        self._serve()

    def _serve(self) -> NoReturn:
        while True:
            free = any(made < self._free for made, _wanted in self._active.values())
            gated = any(made >= self._free for made, _wanted in self._active.values())
            watched = [self._channel.fileno(), *([self._gate] if gated else [])]
            readable, _, _ = select.select(watched, [], [], 0 if free else None)
            if free:
                self._make_one(gated=False)
            if self._gate in readable:
                self._make_one(gated=True)
            if self._channel.fileno() in readable:
                self._take(self._channel.recv(65536))

    def _take(self, data: bytes) -> None:
        if not data:
            os._exit(0)
        for line in data.splitlines():
            number, wanted = map(int, line.split())
            self._active.pop(number, None)
            if wanted:
                self._active[number] = [0, wanted]
                self._requests += 1
                self._held.append(os.urandom(1) * int(self._flags.number("MEMORY_GROWTH")))
                if self._requests == self._flags.number("CRASH_REQUEST"):
                    kill_self()

    def _make_one(self, *, gated: bool) -> None:
        """A token for the first request that may have one."""
        if gated:
            os.read(self._gate, 1)
        number = next(n for n, (made, _) in self._active.items() if (made >= self._free) is gated)
        made, wanted = self._active.pop(number)
        self._stumble(made)
        self._channel.send(b"%d\n" % number)
        if made + 1 < wanted:
            self._active[number] = [made + 1, wanted]

    def _stumble(self, made: int) -> None:
        if self._flags.text("CRASH_TOKEN") == str(made):
            kill_self()
        if self._flags.text("HANG") == str(made):
            signal.pause()
        while self._flags.text("BUSY") == str(made):
            sum(range(1000))


class Request:
    """One HTTP request."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.method, target, _version = head.split(b"\r\n", 1)[0].decode().split(" ")
        parts = urlsplit(target)
        self.path = parts.path
        self.query = dict(parse_qsl(parts.query))
        self.body: dict[str, Any] = json.loads(body) if body else {}


class Api:
    """The API process: HTTP in front of the core."""

    def __init__(self, spec: dict[str, Any], channel: socket.socket, flags: Flags) -> None:
        self._flags = flags
        self._spec = spec
        argv: list[str] = spec["argv"]
        start = argv.index("--served-model-name") + 1
        rest = argv[start:]
        self._names = rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]
        self._channel = channel
        self._text = (flags.text("TEXT") or DEFAULT_TEXT).split()
        self._made: dict[int, asyncio.Queue[bytes]] = {}
        self._counters = dict.fromkeys(
            ("requests", "running", "finished", "aborted", "tokens", "health", "metrics"), 0
        )
        self._prompt_tokens = 0
        self._counted = asyncio.Condition()

    async def run(self, core: int) -> None:
        """Serve until SIGTERM."""
        loop = asyncio.get_running_loop()
        watch = os.pidfd_open(core)
        loop.add_reader(watch, os._exit, 70)
        self._channel.setblocking(False)
        loaded = await loop.sock_recv(self._channel, 7)
        assert loaded == b"loaded\n", loaded
        report(report="loading", phase="serving", done=0, total=0)
        stop = asyncio.Event()
        if not self._flags.text("IGNORE_SIGTERM"):
            loop.add_signal_handler(signal.SIGTERM, stop.set)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._spec["socket"])
        server = await asyncio.start_unix_server(self._connected, sock=listener, limit=2**26)
        report(report="serving")
        tokens = asyncio.create_task(self._receive_tokens())
        if self._flags.text("CRASH_AFTER_S"):
            loop.call_later(self._flags.number("CRASH_AFTER_S"), os.kill, core, signal.SIGKILL)
        await stop.wait()
        loop.remove_reader(watch)
        server.close()
        tokens.cancel()
        os._exit(0)

    async def _receive_tokens(self) -> None:
        rest = b""
        while data := await asyncio.get_running_loop().sock_recv(self._channel, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line and int(line) in self._made:
                    self._made[int(line)].put_nowait(b"")

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await self._answer(await self._read(head, reader), reader, writer)
                await writer.drain()
        writer.close()

    async def _read(self, head: bytes, reader: asyncio.StreamReader) -> Request:
        names = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if names.get(b"transfer-encoding") == b"chunked":
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
            return Request(head, body)
        return Request(head, await reader.readexactly(int(names.get(b"content-length", b"0"))))

    async def _answer(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request.path == self._flags.text("DEAF"):
            await asyncio.Event().wait()
        match request.path:
            case "/health":
                await self._count("health")
                self._send(writer, 200, b"")
            case "/metrics":
                await self._count("metrics")
                self._send(writer, 200, self._metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
            case "/v1/models":
                models = [
                    {"id": n, "object": "model", "root": self._spec["argv"][0], "owned_by": "vllm"}
                    for n in self._names
                ]
                self._send_json(writer, 200, {"object": "list", "data": models})
            case "/tokenize":
                tokens = split(request.body.get("prompt", ""), self._flags.text("TOKENIZER"))
                self._send_json(writer, 200, {"count": len(tokens), "max_model_len": 2048, "tokens": tokens})
            case "/v1/completions" if "prompt_logprobs" in request.body:
                self._send_logprobs(writer, request)
            case "/v1/completions" | "/v1/chat/completions":
                await self._complete(request, reader, writer)
            case "/fake/state":
                self._send_json(writer, 200, self._counters)
            case "/fake/wait":
                name, wanted = next(iter(request.query.items()))
                async with self._counted:
                    await self._counted.wait_for(lambda: self._counters[name] >= int(wanted))
                self._send_json(writer, 200, self._counters)
            case _:
                self._send_json(writer, 404, {"detail": "Not Found"})

    async def _complete(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        refused = int(self._flags.number("REFUSE"))
        name = request.body.get("model", self._names[0])
        if refused or name not in self._names:
            text = "refused" if refused else f"The model `{name}` does not exist."
            error = {"message": text, "type": "NotFoundError", "param": "model", "code": refused or 404}
            self._send_json(writer, refused or 404, {"error": error})
            return
        await self._count("requests")
        await self._count("running")
        number = self._counters["requests"]
        chat = request.path.endswith("chat/completions")
        prompt = json.dumps(request.body["messages"]) if chat else str(request.body["prompt"])
        self._prompt_tokens += len(split(prompt))
        wanted = int(request.body.get("max_tokens") or request.body.get("max_completion_tokens") or 7)
        streams = bool(request.body.get("stream"))
        queue = self._made[number] = asyncio.Queue()
        self._channel.send(b"%d %d\n" % (number, wanted))
        gone = asyncio.create_task(reader.read(1))
        gone.add_done_callback(lambda _: queue.put_nowait(b"gone"))
        common = {"id": f"fake-{number}", "created": int(time.time()), "model": name}
        words: list[str] = []
        if streams:
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
        while len(words) < wanted and await queue.get() == b"":
            words.append((" " if words else "") + self._text[len(words) % len(self._text)])
            await self._count("tokens")
            if streams:
                last = "length" if len(words) == wanted else None
                self._chunk(writer, common | _choice(chat, words[-1], last, streams))
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
        del self._made[number]
        await self._count("running", -1)
        if len(words) < wanted:
            self._channel.send(b"%d 0\n" % number)
            await self._count("aborted")
            raise ConnectionResetError
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await self._count("finished")
        if streams:
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            count = len(split(prompt))
            usage = {"prompt_tokens": count, "completion_tokens": wanted, "total_tokens": count + wanted}
            answer = common | _choice(chat, "".join(words), "length", streams)
            self._send_json(writer, 200, answer | {"usage": usage})

    def _send_logprobs(self, writer: asyncio.StreamWriter, request: Request) -> None:
        if self._flags.text("CRASH_IN") == "check":
            kill_self()
        token_ids = split(request.body["prompt"], self._flags.text("TOKENIZER"))
        off = self._flags.number("WRONG_ANSWER")
        values: list[Any] = [value - off for value in logprobs(token_ids)]
        if self._flags.text("DRIFT"):
            values = [value - random.random() for value in values]
        if self._flags.text("NAN"):
            values[0] = float("nan")  # json writes a bare NaN, as vLLM does
        entries: list[Any] = [None]
        entries += [
            {str(token_id): {"logprob": value, "rank": 1, "decoded_token": "?"}}
            for token_id, value in zip(token_ids[1:], values, strict=True)
        ]
        choice = {"index": 0, "text": " The", "finish_reason": "length", "prompt_logprobs": entries}
        if request.body.get("return_token_ids"):
            choice["prompt_token_ids"] = token_ids
        self._send_json(writer, 200, {"object": "text_completion", "choices": [choice]})

    def _metrics(self) -> str:
        if self._flags.text("BAD_METRICS"):
            return 'vllm:generation_tokens_total{engine="0"} many\n'
        values = {
            "prompt_tokens_total": self._prompt_tokens,
            "generation_tokens_total": self._counters["tokens"],
            "num_requests_running": self._counters["running"],
        }
        lines = []
        for name, value in values.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# HELP vllm:{name} A fake number.\n# TYPE vllm:{name} {kind}")
            lines.append(f'vllm:{name}{{engine="0",model_name="{self._names[0]}"}} {float(value)}')
        return "\n".join(lines) + "\n"

    async def _count(self, name: str, by: int = 1) -> None:
        async with self._counted:
            self._counters[name] += by
            self._counted.notify_all()

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "text/plain") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    @classmethod
    def _send_json(cls, writer: asyncio.StreamWriter, status: int, data: dict[str, Any]) -> None:
        cls._send(writer, status, json.dumps(data).encode(), "application/json")

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
        event = f"data: {json.dumps(data)}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))


def _choice(chat: bool, text: str, finish: str | None, streams: bool) -> dict[str, Any]:
    """What differs between the two endpoints, whole and in pieces."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if not chat:
        choice["text"] = text
        return {"object": "text_completion", "choices": [choice]}
    choice["delta" if streams else "message"] = {"role": "assistant", "content": text}
    return {"object": "chat.completion.chunk" if streams else "chat.completion", "choices": [choice]}


def fork_children(flags: Flags) -> None:
    """Children that nothing ends but SIGKILL."""
    children, strays = int(flags.number("FORK_CHILDREN")), int(flags.number("STRAY_CHILDREN"))
    ready, done = os.pipe()
    for number in range(children + strays):
        between = os.fork()
        if between:
            if number >= children:
                os.waitpid(between, 0)
            else:
                os.read(ready, 1)
            continue
        if number >= children and os.fork():
            os.read(ready, 1)
            os._exit(0)
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        parentage._prctl(parentage.PR_SET_PDEATHSIG, 0)
        os.write(done, b".")
        while True:
            signal.pause()
    os.close(ready)
    os.close(done)


def main() -> None:
    spec = json.loads(sys.argv[-1])
    generation = spec["generation"]
    flags = Flags(generation)
    setproctitle.setproctitle(f"citadel: {spec['model']} API (generation {generation})")
    if flags.text("IGNORE_SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not flags.text("SURVIVE"):
        parentage.await_adoption(spec["supervisor_pid"])
        parentage.die_with_parent(spec["supervisor_pid"])
        parentage.pass_on_to_children()
    if flags.text("NO_HELLO"):
        signal.pause()
    report(report="hello", pid=os.getpid())
    if flags.text("GARBAGE_REPORTS"):
        for line in (b"garbage", b'{"report": "unheard of"}', b'{"report": "hello"}', b"\xff\xfe\0", b"[]"):
            os.write(STATUS_FD, line + b"\n")
    if flags.text("FATAL"):
        report(report="fatal", message=flags.text("FATAL"), permanent=True)
        os._exit(78)
    if flags.text("TROUBLE"):
        report(report="fatal", message=flags.text("TROUBLE"), permanent=False)
        os._exit(70)
    if flags.text("EXIT_AT_START"):
        os._exit(int(flags.number("EXIT_AT_START")))
    if flags.text("LITTER"):
        with open(os.path.join(os.environ["TMPDIR"], "litter"), "w") as litter:
            litter.write("x" * 10_000)
    report(report="loading", phase="config", done=0, total=0)
    time.sleep(flags.number("SLOW_START"))
    ours, theirs = socket.socketpair()
    core = os.fork()
    if not core:
        ours.close()
        Core(theirs, flags).run(f"citadel: {spec['model']} engine core (generation {generation})")
    theirs.close()
    fork_children(flags)
    asyncio.run(Api(spec, ours, flags).run(core))


if __name__ == "__main__":
    main()
