"""Known answers: what a checkpoint must say about a fixed text, to tell whether an engine computes right.

The record compares log-probabilities, not generated text: where two tokens are nearly tied, rounding alone
(bf16, torch.compile) picks the other one, and the texts part although nothing is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from citadel_supervisor.checkpoints.manifest import write_atomic
from citadel_supervisor.errors import CheckpointError

FILE_NAME = "known_answer.json"

DEFAULT_PROMPT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius at sea level. "
    "The Earth goes around the Sun once a year, and the Moon goes around the Earth once a month. "
    "A triangle has three sides, and a square has four."
)


class KnownAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`logprobs[i]` is the natural logarithm of the probability of `token_ids[i + 1]` given those before it.

    `token_ids` is how the tokenizer sees `prompt`, special tokens as it adds them by default, which is also
    how /v1/completions does.
    """

    version: Literal[1] = 1
    prompt: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    dtype: str
    made_with: str

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(f"{len(self.token_ids)} tokens do not go with {len(self.logprobs)} logprobs")
        if not all(-1e3 < value <= 0 for value in self.logprobs):
            raise ValueError("a logprob is not a finite number at or below 0")

    @classmethod
    def load(cls, path: Path) -> KnownAnswer:
        """Raises CheckpointError when `path` is absent or not a valid record."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise CheckpointError(f"cannot read the known answer {path}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the known answer {path} is not valid: {error}; record it anew") from error

    def save(self, path: Path) -> None:
        """Writes `path` atomically."""
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def record_fp32(checkpoint: Path, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
    """What `checkpoint` answers in float32, as the fields of a KnownAnswer.

    Loads the whole model with transformers (4 bytes a parameter) and blocks for seconds. Nothing is fetched.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    ).eval()
    token_ids: list[int] = tokenizer(prompt).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])
    return {
        "version": 1,
        "prompt": prompt,
        "token_ids": token_ids,
        "logprobs": [round(value, 6) for value in chosen[:, 0].tolist()],
        "dtype": "float32",
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
