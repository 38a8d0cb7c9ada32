from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from citadel_supervisor.checkpoints.cache import checkpoint_dir
from citadel_supervisor.checkpoints.known_answer import DEFAULT_PROMPT, FILE_NAME, KnownAnswer, record_fp32
from citadel_supervisor.errors import CheckpointError

VALID: dict[str, Any] = {
    "version": 1,
    "prompt": "a b c",
    "token_ids": [1, 2, 3],
    "logprobs": [-0.5, 0.0],
    "dtype": "float32",
    "made_with": "a test",
}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    answer = msgspec.convert(VALID, KnownAnswer)
    answer.save(tmp_path / FILE_NAME)
    assert KnownAnswer.load(tmp_path / FILE_NAME) == answer
    assert msgspec.json.decode((tmp_path / FILE_NAME).read_bytes()) == VALID
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME], "no temporary file stays behind"


@pytest.mark.parametrize(
    "wrong",
    [
        {"logprobs": [-0.5]},
        {"logprobs": [-0.5, 0.1]},
        {"logprobs": [-0.5, -1e9]},
        {"token_ids": [], "logprobs": []},
        {"token_ids": ["a", "b", "c"]},
        {"version": 2},
        {"prompt": None},
    ],
)
def test_an_invalid_record_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(msgspec.json.encode(VALID | wrong))
    with pytest.raises(CheckpointError, match=r"is not valid.*record it anew"):
        KnownAnswer.load(path)


def test_half_a_record_and_none_at_all_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with pytest.raises(CheckpointError, match="No such file"):
        KnownAnswer.load(path)
    path.write_bytes(msgspec.json.encode(VALID)[:40])
    with pytest.raises(CheckpointError, match="is not valid"):
        KnownAnswer.load(path)
    path.write_bytes(msgspec.json.encode(VALID).replace(b"a b c", b"\xff\xfe"))
    with pytest.raises(CheckpointError, match="is not valid"):
        KnownAnswer.load(path)


@pytest.mark.engine
def test_the_demo_checkpoint_still_gives_its_recorded_answer() -> None:
    checkpoint = checkpoint_dir("SmolLM2-135M-Instruct")
    recorded = KnownAnswer.load(checkpoint / FILE_NAME)
    assert recorded.prompt == DEFAULT_PROMPT
    assert 40 <= len(recorded.token_ids) <= 60
    now = msgspec.convert(record_fp32(checkpoint, recorded.prompt), KnownAnswer)
    assert now.token_ids == recorded.token_ids
    assert now.logprobs == pytest.approx(recorded.logprobs, abs=1e-3)
