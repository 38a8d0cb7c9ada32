"""Requests that run while something happens to their engine, and what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.e2e.daemon import PATIENCE_S

PROMPT = "Once upon a time"


@dataclass(slots=True)
class Outcome:
    """One request. `chunks` counts those with text; `error` is what the client raised."""

    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    generation: int = 0
    text: str = ""
    chunks: int = 0
    finish: str | None = None
    error: openai.APIError | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first text, or at the end."""
    task: asyncio.Task[None] | None = None

    @property
    def whole(self) -> bool:
        return self.error is None and self.finish == "length"

    async def end(self) -> Outcome:
        """Itself, once it has ended."""
        assert self.task is not None
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_S)
        return self

    async def output(self) -> Outcome:
        """Itself, once its stream has begun."""
        await asyncio.wait_for(self.started.wait(), PATIENCE_S)
        assert self.chunks, self.error
        return self


class Load:
    """Sends requests through one port, with the official client and no retries."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client
        self._tasks: list[asyncio.Task[None]] = []

    def stream(self, model: str, tokens: int, prompt: str = PROMPT) -> Outcome:
        """Begin a streamed completion of so many tokens."""
        return self._begin(self._stream, model, tokens, prompt)

    def plain(self, model: str, tokens: int, prompt: str = PROMPT) -> Outcome:
        """Begin a completion that is not streamed."""
        return self._begin(self._plain, model, tokens, prompt)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, send: Any, model: str, tokens: int, prompt: str) -> Outcome:
        outcome = Outcome()
        outcome.task = asyncio.create_task(self._guard(send, outcome, model, tokens, prompt))
        self._tasks.append(outcome.task)
        return outcome

    async def _guard(self, send: Any, outcome: Outcome, model: str, tokens: int, prompt: str) -> None:
        fields = {"temperature": 0, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
        try:
            await send(outcome, model=model, prompt=prompt, **fields)
        except openai.APIError as error:
            outcome.error = error
        outcome.ended = time.monotonic()
        outcome.started.set()

    async def _stream(self, outcome: Outcome, **request: Any) -> None:
        async with await self._client.completions.create(stream=True, **request) as stream:
            outcome.generation = int(stream.response.headers["x-citadel-generation"])
            async for chunk in stream:
                for choice in chunk.choices:
                    outcome.text += choice.text
                    outcome.chunks += bool(choice.text)
                    outcome.finish = choice.finish_reason or outcome.finish
                if outcome.chunks:
                    outcome.started.set()

    async def _plain(self, outcome: Outcome, **request: Any) -> None:
        raw = await self._client.completions.with_raw_response.create(**request)
        outcome.generation = int(raw.headers["x-citadel-generation"])
        [choice] = raw.parse().choices
        outcome.text = choice.text
        outcome.finish = choice.finish_reason


@asynccontextmanager
async def load(port: int) -> AsyncIterator[Load]:
    """Requests through that port; those still running at the end are given up."""
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    async with client:
        requests = Load(client)
        try:
            yield requests
        finally:
            await requests.cancel()
