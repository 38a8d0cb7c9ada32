"""What a checkpoint directory holds, read without torch: config.json and the headers of the weights.

This is the light look that tells whether a checkpoint is there and whole and what it will need. It reads
some kilobytes a file; whether the weights are right, the known-answer check tells later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from citadel_supervisor.checkpoints.safetensors_header import Header, read_header
from citadel_supervisor.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("tekken.json",), ("vocab.json", "merges.txt"))
_MOST_SHARDS = 1000
_NOT_ON_CPU = frozenset({"bitsandbytes", "gguf"})
"""Quantisations that vLLM's CPU backend cannot run."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint as far as it could be read; 0, "" or None where it does not say.

    `problems` is empty where an engine can be expected to load it. `weight_bytes` are the tensors' bytes
    on disk, which for every scheme that runs on CPUs are also those in memory.
    """

    path: Path
    problems: tuple[str, ...] = ()
    architecture: str = ""
    model_type: str = ""
    dtype: str = ""
    quantisation: str = ""
    """For instance "compressed-tensors W8A8"; empty where the weights are plain."""
    weight_bytes: int = 0
    shards: int = 0
    max_context: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    experts: int = 0
    sliding_window: int | None = None
    chat_template: bool = False

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of KV cache that one token of plain attention takes; 0 where the shape is unknown."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def require_complete(self) -> None:
        """Raise CheckpointError with every problem."""
        if self.problems:
            raise CheckpointError(f"{self.path}: {'; '.join(self.problems)}")


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """What is in `path`. Blocks for some small reads; raises nothing: what is wrong is in `problems`."""
    info = CheckpointInfo(path)
    try:
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        return replace(info, problems=("there is no such directory",))
    except OSError as error:
        return replace(info, problems=(f"cannot be read: {(error.strerror or str(error)).lower()}",))
    problems: list[str] = []
    config: dict[str, Any] = {}
    headers: list[Header] = []
    try:
        config = _read_json(path / "config.json")
    except CheckpointError as error:
        problems.append(str(error))
    for item in _weights(path, names):
        if isinstance(item, Header):
            headers.append(item)
        else:
            problems.append(item)
    if not any(names.issuperset(files) for files in _TOKENIZERS):
        problems.append("no tokenizer (tokenizer.json, or tokenizer.model, or vocab.json and merges.txt)")
    info = _described(info, config, headers)
    if info.quantisation.partition(" ")[0] in _NOT_ON_CPU:
        problems.append(f"quantised with {info.quantisation}, which vLLM does not run on CPUs")
    if config and not info.architecture:
        problems.append("config.json names no architecture")
    return replace(info, problems=tuple(problems), chat_template=_has_chat_template(path, names))


def _described(info: CheckpointInfo, config: dict[str, Any], headers: list[Header]) -> CheckpointInfo:
    text = _mapping(config.get("text_config")) or config
    architectures = config.get("architectures")
    heads, hidden = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    return replace(
        info,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        model_type=str(config.get("model_type") or ""),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or ""),
        quantisation=_quantisation(_mapping(config.get("quantization_config"))),
        weight_bytes=sum(header.weight_bytes for header in headers),
        shards=len(headers),
        max_context=_max_context(text),
        vocab_size=_number(text, "vocab_size"),
        hidden_size=hidden,
        layers=_number(text, "num_hidden_layers"),
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else 0),
        experts=_number(text, "num_local_experts") or _number(text, "num_experts"),
        sliding_window=_number(text, "sliding_window") or None,
    )


def _weights(path: Path, names: set[str]) -> Iterator[Header | str]:
    """The header of each weight file, or a line about what is wrong with it."""
    expected: dict[str, str] = {}
    if INDEX in names:
        try:
            expected = {
                str(k): str(v) for k, v in _mapping(_read_json(path / INDEX).get("weight_map")).items()
            }
        except CheckpointError as error:
            yield str(error)
            return
        if not expected:
            yield f"{INDEX} is damaged: it has no weight_map"
    files = sorted(set(expected.values()))
    if INDEX not in names:
        files = _without_index(names)
        if not files:
            yield _no_weights(names)
    for name in files:
        if name not in names:
            yield f"{name} is missing"
            continue
        try:
            header = read_header(path / name)
        except CheckpointError as error:
            yield str(error)
            continue
        absent = sorted(
            tensor for tensor, file in expected.items() if file == name and tensor not in header.names
        )
        if absent:
            yield f"{name} lacks {len(absent)} of its tensors, for instance {absent[0]}"
        yield header


def _without_index(names: set[str]) -> list[str]:
    """Every safetensors file, and those whose numbers say that they should be there."""
    files = {name for name in names if name.endswith(".safetensors")}
    for name in tuple(files):
        if part := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name):
            count = min(int(part[3]), _MOST_SHARDS)
            files |= {f"{part[1]}-{number:05}-of-{part[3]}.safetensors" for number in range(1, count + 1)}
    return sorted(files)


def _no_weights(names: set[str]) -> str:
    for ending in (".gguf", ".bin", ".pth", ".pt"):
        if any(name.endswith(ending) for name in names):
            return f"no safetensors weights, only {ending} files; transformers' save_pretrained converts them"
    return "no weights (model.safetensors, or an index and its shards)"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged: it is not JSON") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is damaged: it is not a JSON object")
    return data


def _quantisation(config: dict[str, Any]) -> str:
    method = str(config.get("quant_method") or "")
    if method in ("awq", "gptq"):
        return f"{method} W{config.get('bits', '?')}A16"
    groups = list(_mapping(config.get("config_groups")).values())
    if method == "compressed-tensors" and groups:
        group = _mapping(groups[0])
        weights, inputs = _mapping(group.get("weights")), _mapping(group.get("input_activations"))
        return f"{method} W{weights.get('num_bits', '?')}A{inputs.get('num_bits', 16)}"
    return method


def _max_context(text: dict[str, Any]) -> int:
    """The positions that the model was trained for, as stretched by its rotary scaling."""
    positions = _number(text, "max_position_embeddings")
    scaling = _mapping(text.get("rope_scaling")) or _mapping(text.get("rope_parameters"))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor = scaling.get("factor")
    # longrope and llama3 checkpoints give the stretched length already.
    if kind in ("linear", "dynamic", "yarn") and isinstance(factor, int | float):
        base = _number(scaling, "original_max_position_embeddings") or positions
        return max(positions, int(base * factor))
    return positions


def _has_chat_template(path: Path, names: set[str]) -> bool:
    if names & {"chat_template.jinja", "chat_template.json"}:
        return True
    try:
        return bool(_read_json(path / "tokenizer_config.json").get("chat_template"))
    except CheckpointError:
        return False


def _number(mapping: dict[str, Any], key: str) -> int:
    value = mapping.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
