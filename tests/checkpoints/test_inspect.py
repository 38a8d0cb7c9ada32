"""The light look at a checkpoint: what it says, and every way in which one can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.checkpoints.inspect import INDEX, inspect_checkpoint
from citadel_supervisor.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}


def write_weights(path: Path, **sizes: int) -> None:
    """A safetensors file of zeros with one bf16 tensor of each name, of so many bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def write_checkpoint(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    write_weights(path / "model.safetensors", a=64, b=32)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def test_a_whole_checkpoint(checkpoint: Path) -> None:
    info = inspect_checkpoint(checkpoint)
    assert info.problems == ()
    info.require_complete()
    assert (info.architecture, info.dtype, info.quantisation) == ("MistralForCausalLM", "bfloat16", "")
    assert (info.weight_bytes, info.shards, info.max_context) == (96, 1, 32768)
    assert info.kv_bytes_per_token(2) == 128 * 1024, "the well-known figure of Mistral 7B"
    assert info.chat_template
    assert info.sliding_window is None


def test_a_sharded_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    write_weights(checkpoint / "one.safetensors", a=64)
    write_weights(checkpoint / "two.safetensors", b=32)
    write_weights(checkpoint / "consolidated.safetensors", a=64, b=32)
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    info = inspect_checkpoint(checkpoint)
    assert info.problems == ()
    assert (info.weight_bytes, info.shards) == (96, 2), "what the index does not name does not count"


def _shards(path: Path) -> None:
    (path / "model.safetensors").rename(path / "one.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))


def _cut(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is damaged: it is not JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "config.json is damaged: it is not a JSON object"),
        (lambda p: write_checkpoint(p, architectures=[]), "config.json names no architecture"),
        (
            lambda p: (p / "tokenizer.json").unlink(),
            "no tokenizer (tokenizer.json, or tokenizer.model, or vocab.json and merges.txt)",
        ),
        (
            lambda p: (p / "model.safetensors").unlink(),
            "no weights (model.safetensors, or an index and its shards)",
        ),
        (
            lambda p: (p / "model.safetensors").rename(p / "model.gguf"),
            "no safetensors weights, only .gguf files; transformers' save_pretrained converts them",
        ),
        (_shards, "two.safetensors is missing"),
        (lambda p: (p / INDEX).write_text("{}"), f"{INDEX} is damaged: it has no weight_map"),
        (
            _cut,
            "model.safetensors is cut off: it holds 86 bytes of tensors where its header says 96",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\0" * 5),
            "model.safetensors is not a safetensors file, or cut off: 5 bytes",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "model.safetensors is not a safetensors file, or cut off: 43 bytes",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"abcd"),
            "model.safetensors is damaged: its header is not JSON",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 7) + b'{"a":1}'),
            "model.safetensors is damaged: its header is not a table of tensors",
        ),
        (
            lambda p: (p / "model.safetensors").rename(p / "model-00001-of-00002.safetensors"),
            "model-00002-of-00002.safetensors is missing",
        ),
        (
            lambda p: write_checkpoint(p, quantization_config={"quant_method": "bitsandbytes"}),
            "quantised with bitsandbytes, which vLLM does not run on CPUs",
        ),
    ],
)
def test_what_is_broken_is_said(checkpoint: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(checkpoint)
    info = inspect_checkpoint(checkpoint)
    assert said in info.problems
    with pytest.raises(CheckpointError, match="model: "):
        info.require_complete()


def test_a_shard_that_lacks_tensors_of_the_index(checkpoint: Path) -> None:
    weight_map = {name: "model.safetensors" for name in ("a", "b", "c", "d")}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert inspect_checkpoint(checkpoint).problems == (
        "model.safetensors lacks 2 of its tensors, for instance c",
    )


def test_no_directory(tmp_path: Path) -> None:
    assert inspect_checkpoint(tmp_path / "none").problems == ("there is no such directory",)
    file = tmp_path / "file"
    file.touch()
    assert inspect_checkpoint(file).problems == ("cannot be read: not a directory",)


def test_an_index_cannot_lead_out_of_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "outside.safetensors", a=64)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert inspect_checkpoint(checkpoint).problems == ("../outside.safetensors is missing",)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq W4A16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
                },
            },
            "compressed-tensors W8A8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}, "input_activations": None}},
            },
            "compressed-tensors W4A16",
        ),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_the_quantisation_in_a_word(tmp_path: Path, quantization: dict[str, Any], said: str) -> None:
    info = inspect_checkpoint(write_checkpoint(tmp_path / "model", quantization_config=quantization))
    assert info.quantisation == said


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 32768),
        ({"rope_type": "default"}, 32768),
        ({"type": "linear", "factor": 2.0}, 65536),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "llama3", "factor": 8.0}, 32768),
    ],
)
def test_the_longest_context(tmp_path: Path, scaling: dict[str, Any] | None, context: int) -> None:
    info = inspect_checkpoint(write_checkpoint(tmp_path / "model", rope_scaling=scaling))
    assert info.max_context == context
