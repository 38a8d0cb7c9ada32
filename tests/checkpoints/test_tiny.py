from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from citadel_supervisor.checkpoints import manifest
from citadel_supervisor.checkpoints.tiny import VOCABULARY, Arch, main, make_tiny
from citadel_supervisor.errors import CheckpointError


@pytest.mark.engine
@pytest.mark.parametrize("arch", get_args(Arch))
def test_every_architecture_generates_and_chats(arch: Arch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = make_tiny(arch, tmp_path / arch)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == (arch, "bfloat16")

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == VOCABULARY, "every token the weights can choose has a text"
    text = "Grüße, the fox! 你好"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = AutoModelForCausalLM.from_pretrained(out).generate(**prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.engine
def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    weights = [
        manifest.sha256(make_tiny("mixtral", tmp_path / str(i), seed=seed) / "model.safetensors")
        for i, seed in enumerate((7, 7, 8))
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.engine
def test_what_is_there_is_kept_and_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    out = make_tiny("llama", tmp_path / "model")
    weights = out / "model.safetensors"
    before = weights.stat()
    make_tiny("llama", out)
    assert weights.stat().st_ino == before.st_ino
    weights.write_bytes(b"cut off")
    make_tiny("llama", out)
    assert weights.stat().st_size == before.st_size


def test_a_foreign_directory_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="name another directory"):
        make_tiny("llama", tmp_path / "mine")
    assert main(["llama", str(tmp_path / "mine")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
