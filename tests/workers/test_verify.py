"""The known-answer check: by itself against answers made up here, and as part of a worker's start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.checkpoints.known_answer import DEFAULT_PROMPT, FILE_NAME, KnownAnswer
from citadel_supervisor.config import ModelSettings
from citadel_supervisor.errors import VerifyError, WorkerError
from citadel_supervisor.states import WorkerState as S
from citadel_supervisor.workers.verify import check_known_answer
from tests.fake_engine import logprobs, split
from tests.workers.conftest import StartFleet

TOLERANCE = 0.25
IDS = [7, 8, 9]
LOGPROBS = [-1.5, -0.25]


def answer(ids: list[int] = IDS, values: list[float] = LOGPROBS) -> bytes:
    """What vLLM answers to prompt_logprobs=0 with return_token_ids."""
    entries = [
        {str(i): {"logprob": v, "rank": 1, "decoded_token": "x"}}
        for i, v in zip(ids[1:], values, strict=True)
    ]
    choice = {"index": 0, "text": "", "prompt_logprobs": [None, *entries], "prompt_token_ids": ids}
    return json.dumps({"choices": [choice]}).encode()


class Engine:
    """Answers in turn, the last one for ever."""

    def __init__(self, *answers: bytes, status: int = 200) -> None:
        self._answers = list(answers)
        self._status = status
        self.bodies: list[dict[str, Any]] = []

    async def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        assert (method, path) == ("POST", "/v1/completions")
        self.bodies.append(json.loads(body))
        return self._status, self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.fixture
def model(tmp_path: Path) -> ModelSettings:
    (tmp_path / "checkpoint").mkdir()
    return ModelSettings(port=0, checkpoint=str(tmp_path / "checkpoint"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    (tmp_path / "records").mkdir()
    return tmp_path / "records"


def ship(model: ModelSettings, **fields: Any) -> None:
    """Put a record into the checkpoint, as its makers would."""
    known = {
        "prompt": "a b c",
        "token_ids": IDS,
        "logprobs": LOGPROBS,
        "dtype": "float32",
        "made_with": "a test",
    }
    (model.checkpoint_path / FILE_NAME).write_text(json.dumps({"version": 1, **known, **fields}))


async def check(engine: Engine, model: ModelSettings, records: Path) -> str:
    return await check_known_answer(engine.ask, "m", model, records, TOLERANCE)


async def test_a_close_answer_is_right(model: ModelSettings, records: Path) -> None:
    ship(model)
    engine = Engine(answer(values=[-1.4, -0.25]))
    assert "within 0.050 nats of the record (float32) over 2 tokens" in await check(engine, model, records)
    assert engine.bodies[0]["prompt"] == "a b c" and engine.bodies[0]["temperature"] == 0
    assert list(records.iterdir()) == [], "the checkpoint's own record is enough"


async def test_the_mean_difference_counts_not_a_single_one(model: ModelSettings, records: Path) -> None:
    ship(model)
    assert await check(Engine(answer(values=[-1.5 - 0.49, -0.25])), model, records)
    with pytest.raises(
        VerifyError, match=r"wrong known answer.*differ by 0.255 nats on average, 0.25 allowed"
    ):
        await check(Engine(answer(values=[-1.5 - 0.51, -0.25])), model, records)


@pytest.mark.parametrize("ids", [[7, 8, 10], [6, 8, 9], [7, 8], [7, 8, 9, 9]])
async def test_other_tokens_are_noticed(model: ModelSettings, records: Path, ids: list[int]) -> None:
    ship(model)
    with pytest.raises(VerifyError, match="other tokens than recorded: another tokenizer"):
        await check(Engine(answer(ids, [-1.0] * (len(ids) - 1))), model, records)


@pytest.mark.parametrize(
    "broken",
    [
        answer().replace(b"-1.5", b"NaN"),
        answer().replace(b"-1.5", b"-Infinity"),
        answer().replace(b"-1.5", b"null"),
        answer().replace(b'"prompt_logprobs"', b'"other"'),
        answer().replace(b"[null, ", b"["),
        answer([7], []),
        b'{"choices": []}',
        b"",
        b"not JSON",
    ],
)
@pytest.mark.parametrize("shipped", [True, False])
async def test_what_is_not_a_number_is_refused(
    model: ModelSettings, records: Path, broken: bytes, shipped: bool
) -> None:
    if shipped:
        ship(model)
    with pytest.raises(VerifyError):
        await check(Engine(broken), model, records)
    assert list(records.iterdir()) == [], "and never becomes a record"


async def test_no_answer_is_no_verdict(model: ModelSettings, records: Path) -> None:
    with pytest.raises(WorkerError, match="status 500: out of luck") as caught:
        await check(Engine(b"out of luck", status=500), model, records)
    assert not isinstance(caught.value, VerifyError), "a restart may help"


async def test_the_first_run_is_kept_and_the_next_is_compared_with_it(
    model: ModelSettings, records: Path
) -> None:
    engine = Engine(answer())
    assert "finite and repeatable over 2 tokens; kept as the record" in await check(engine, model, records)
    assert [body["prompt"] for body in engine.bodies] == [DEFAULT_PROMPT] * 2
    (path,) = records.iterdir()
    kept = KnownAnswer.load(path)
    assert (list(kept.token_ids), list(kept.logprobs), kept.dtype) == (IDS, LOGPROBS, "bfloat16")
    assert "within 0.000 nats" in await check(Engine(answer()), model, records)
    with pytest.raises(VerifyError, match="wrong known answer"):
        await check(Engine(answer(values=[-3.0, -3.0])), model, records)


async def test_what_does_not_repeat_is_refused(model: ModelSettings, records: Path) -> None:
    with pytest.raises(VerifyError, match=r"0\.0020 nats apart: it does not repeat"):
        await check(Engine(answer(), answer(values=[-1.502, -0.25])), model, records)
    with pytest.raises(VerifyError, match="it does not repeat"):
        await check(Engine(answer(), answer([7, 8], [-1.5])), model, records)
    with pytest.raises(VerifyError, match="make no sense"):
        await check(Engine(answer(values=[0.5, 0.5])), model, records)
    assert list(records.iterdir()) == []


async def test_a_kept_record_is_of_these_very_files_and_settings(model: ModelSettings, records: Path) -> None:
    weights = model.checkpoint_path / "model.safetensors"
    weights.write_bytes(b"weights")
    await check(Engine(answer()), model, records)
    os.utime(weights, (1, 1))
    other = answer(values=[-3.0, -3.0])
    assert "kept as the record" in await check(Engine(other), model, records), "the weights are other ones"
    halved = model.model_copy(update={"kv_cache_dtype": "fp8"})
    assert "kept as the record" in await check(Engine(answer()), halved, records)
    assert len(list(records.iterdir())) == 3


async def test_a_damaged_record_is_refused_not_replaced(model: ModelSettings, records: Path) -> None:
    ship(model, logprobs=[-1.0])
    with pytest.raises(VerifyError, match=r"is not valid.*record it anew"):
        await check(Engine(answer()), model, records)


# As part of a worker's start.


def record_of(shift: float) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        ids = split(DEFAULT_PROMPT)
        values = tuple(value - shift for value in logprobs(ids))
        KnownAnswer(
            prompt=DEFAULT_PROMPT, token_ids=tuple(ids), logprobs=values, dtype="float32", made_with="a test"
        ).save(checkpoint / FILE_NAME)

    return write


async def test_a_worker_says_how_close_it_is(start_fleet: StartFleet, run_dir: Path) -> None:
    (run_dir / "checkpoint").mkdir()
    record_of(0.1)(run_dir / "checkpoint")
    rig = await start_fleet()
    assert "log-probabilities within 0.100 nats of the record (float32)" in (await rig.ready()).reason


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"WRONG_ANSWER": 3}, "wrong known answer: log-probabilities differ by 3.000 nats"),
        ({"TOKENIZER": "other"}, "another tokenizer"),
        ({"NAN": 1}, "a NaN among them"),
    ],
)
async def test_a_wrong_worker_is_quarantined_at_once_and_says_why(
    start_fleet: StartFleet, run_dir: Path, flags: dict[str, object], said: str
) -> None:
    (run_dir / "checkpoint").mkdir()
    record_of(0)(run_dir / "checkpoint")
    rig = await start_fleet(**flags)  # type: ignore[arg-type]
    seen = await rig.settled()
    assert (seen.state, seen.generation) == (S.QUARANTINED, 1)
    assert said in seen.reason
    assert S.READY not in rig.log.states()


async def test_a_worker_whose_answers_drift_is_quarantined(start_fleet: StartFleet) -> None:
    rig = await start_fleet(DRIFT=1)
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED and "does not repeat" in seen.reason


async def test_the_second_start_is_compared_with_the_first(start_fleet: StartFleet) -> None:
    rig = await start_fleet(WRONG_ANSWER="1@2")
    assert "kept as the record" in (await rig.ready()).reason
    rig.alpha.restart(0)
    await rig.log.move(S.STARTING, generation=2)
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED and "differ by 1.000 nats" in seen.reason


async def test_an_engine_lost_during_the_check_is_tried_again(start_fleet: StartFleet) -> None:
    rig = await start_fleet(CRASH_IN="check@1")
    assert (await rig.ready_again(2)).restarts == 1
    assert rig.log.states(generation=1)[2:] == [S.VERIFYING, S.FAILED, S.BACKING_OFF]
