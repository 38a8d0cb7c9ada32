"""The known-answer check: does this engine compute what this checkpoint should?

A fixed prompt is sent to the engine's own API and the log-probabilities of its tokens are compared
with a record: the checkpoint's (made in float32), or the one kept from its first run here. Text is
never compared: near ties make correct engines differ in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from citadel_supervisor.checkpoints.known_answer import DEFAULT_PROMPT, FILE_NAME, KnownAnswer
from citadel_supervisor.config import ModelSettings
from citadel_supervisor.errors import CheckpointError, VerifyError, WorkerError

Ask = Callable[[str, str, bytes], Awaitable[tuple[int, bytes]]]
"""`ask(method, path, body)` speaks HTTP to the engine and returns the status and the body."""

REPEAT_TOLERANCE = 1e-3
"""Two runs of one prompt, alone in the engine, differ by less than this, in nats."""


async def check_known_answer(
    ask: Ask, model_id: str, model: ModelSettings, records: Path, tolerance: float
) -> str:
    """Compare the engine with its record; returns a line for the operator.

    Without a record: the answer must be finite and repeatable, and is then kept under `records`.
    Raises VerifyError when the engine computes something else, WorkerError when it gives no answer.
    """
    path = _record_path(model, records)
    if path.exists():
        try:
            record = KnownAnswer.load(path)
        except CheckpointError as error:
            raise VerifyError(str(error)) from error
        token_ids, logprobs = await _answer(ask, model_id, record.prompt)
        return _compare(record, token_ids, logprobs, tolerance)
    token_ids, logprobs = await _answer(ask, model_id, DEFAULT_PROMPT)
    again = (await _answer(ask, model_id, DEFAULT_PROMPT))[1]
    worst = max((abs(one - other) for one, other in zip(logprobs, again, strict=False)), default=math.inf)
    if len(again) != len(logprobs) or worst > REPEAT_TOLERANCE:
        raise VerifyError(
            f"the same prompt gave log-probabilities {worst:.4f} nats apart: it does not repeat"
        )
    made_with = f"first run of {model_id}, kv cache {model.kv_cache_dtype}"
    try:
        record = KnownAnswer(
            prompt=DEFAULT_PROMPT,
            token_ids=token_ids,
            logprobs=logprobs,
            dtype=model.dtype,
            made_with=made_with,
        )
    except ValueError as error:
        raise VerifyError(f"the log-probabilities make no sense: {error}") from error
    record.save(path)
    return f"finite and repeatable over {len(logprobs)} tokens; kept as the record"


def _record_path(model: ModelSettings, records: Path) -> Path:
    """The checkpoint's own record, else the place of the one kept here for these very files."""
    checkpoint = model.checkpoint_path
    shipped = checkpoint / FILE_NAME
    if shipped.exists():
        return shipped
    seen = hashlib.sha256(f"{model.dtype} {model.kv_cache_dtype}".encode())
    for file in sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")]):
        stat = file.stat()
        seen.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return records / f"{checkpoint.name}-{seen.hexdigest()[:16]}.json"


async def _answer(ask: Ask, model_id: str, prompt: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The prompt's token ids, and the log-probability of each but the first."""
    body = {
        "model": model_id,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    status, answer = await ask("POST", "/v1/completions", msgspec.json.encode(body))
    if status != 200:
        text = answer[:300].decode(errors="replace")
        raise WorkerError(f"the known-answer check was answered with status {status}: {text}")
    try:
        choice: dict[str, Any] = msgspec.json.decode(answer)["choices"][0]
        token_ids = tuple(int(token_id) for token_id in choice["prompt_token_ids"])
        # The first token is not predicted by anything: its entry is null.
        entries = zip(token_ids[1:], choice["prompt_logprobs"][1:], strict=True)
        logprobs = tuple(float(entry[str(token_id)]["logprob"]) for token_id, entry in entries)
    except (msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        # vLLM answers NaN as a bare NaN, which is not JSON: a broken model shows up here too.
        raise VerifyError(f"the log-probabilities cannot be read ({error}); a NaN among them?") from error
    if not logprobs or not all(math.isfinite(value) for value in logprobs):
        raise VerifyError("a log-probability is not finite")
    return token_ids, logprobs


def _compare(
    record: KnownAnswer, token_ids: tuple[int, ...], logprobs: tuple[float, ...], tolerance: float
) -> str:
    if token_ids != record.token_ids:
        raise VerifyError("the prompt is split into other tokens than recorded: another tokenizer?")
    differences = [abs(one - other) for one, other in zip(logprobs, record.logprobs, strict=True)]
    mean = sum(differences) / len(differences)
    if mean > tolerance:
        raise VerifyError(
            f"wrong known answer: log-probabilities differ by {mean:.3f} nats on average, "
            f"{tolerance:g} allowed; the weights or the engine are not what the record was made with"
        )
    return (
        f"log-probabilities within {mean:.3f} nats of the record ({record.dtype}) "
        f"over {len(differences)} tokens"
    )
