"""Tiny checkpoints of the real architectures with random weights, for tests that need an engine.

They answer nonsense, but they load, schedule, tokenize and stream like the real ones, in a second and
a few megabytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from citadel_supervisor.checkpoints import gguf, manifest
from citadel_supervisor.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Arch = Literal["mixtral", "mistral", "phi3", "llama"]

VOCABULARY = 384
"""All of them known to the tokenizer: 7 special tokens, 256 bytes, the rest learnt from CORPUS."""
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
"""In the order of their ids. Generation ends at `</s>` or `<|end|>`."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention; heads of 32, the least vLLM's CPU attention takes
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXTRA: dict[Arch, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "mistral": {"sliding_window": None},
    "phi3": {"original_max_position_embeddings": 2048},
    "llama": {},
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CORPUS = """The quick brown fox jumps over the lazy dog. A server answers the requests that it is sent, and
a supervisor starts the workers, watches them, and starts them again when they fail. Each worker has a model,
and each model has tokens, weights and a cache. When there is no memory left, nothing can be loaded. What is
the capital of France? The capital of France is Paris. Tell me a story about a fox and a dog, please."""


def make_tiny(arch: Arch, out: Path, *, seed: int = 0) -> Path:
    """Makes the checkpoint directory `out` unless it is there already, and returns it.

    The same `arch` and `seed` give the same bytes. `out` appears whole or not at all. Blocks: some seconds
    where torch is not imported yet. Raises CheckpointError where the engine's packages are missing, and
    where `out` exists and is something else.
    """
    recipe = f"tiny 1, {arch}, seed {seed}"
    with manifest.locked(out.with_name(f".{out.name}.lock")):
        if manifest.problem_of(out, recipe) is None:
            return out
        if out.exists() and not (out / manifest.NAME).exists():
            raise CheckpointError(f"{out} exists and is not a checkpoint made here; name another directory")
        made = out.with_name(f".{out.name}.partial")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            gguf.quiet_transformers()
            _save_model(arch, made, seed)
            _tokenizer().save_pretrained(made)
        except ImportError as error:
            raise CheckpointError(
                f"tiny checkpoints need the package {error.name}; run 'make venv'"
            ) from error
        manifest.Manifest.of(made, recipe).save(made)
        manifest.publish(made, out)
    return out


def _save_model(arch: Arch, out: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(arch, dtype="bfloat16", **SHAPE, **EXTRA[arch])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, SPECIAL_TOKENS.index("<|end|>")]
    model.save_pretrained(out)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows some English and, by its bytes, everything else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=SHAPE["max_position_embeddings"],
        chat_template=CHAT_TEMPLATE,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m citadel_supervisor.checkpoints.tiny",
        description="Makes a tiny checkpoint with random weights, for tests. A seed decides every byte.",
    )
    parser.add_argument("arch", choices=get_args(Arch))
    parser.add_argument("dir", type=Path, help="the directory to make; its parent must exist")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        print(make_tiny(options.arch, options.dir.absolute(), seed=options.seed))
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
