"""What a finished checkpoint directory holds (`manifest.json`), and how one comes to be there whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from citadel_supervisor.errors import CheckpointError

NAME = "manifest.json"


class File(msgspec.Struct, frozen=True):
    """One file: its size in bytes and its SHA-256, in hex."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Every file of a checkpoint directory but the manifest itself.

    `recipe` says what made it, from what; a directory made by another recipe is made anew.
    """

    version: int = 1
    recipe: str
    files: dict[str, File]

    @classmethod
    def of(cls, directory: Path, recipe: str) -> Manifest:
        """Reads and hashes every file of `directory`."""
        names = sorted(p.name for p in directory.iterdir() if p.name != NAME)
        files = {n: File(size=(directory / n).stat().st_size, sha256=sha256(directory / n)) for n in names}
        return cls(recipe=recipe, files=files)

    def save(self, directory: Path) -> None:
        write_atomic(directory / NAME, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def problem(self, directory: Path, *, checksums: bool) -> str | None:
        """What differs between the manifest and `directory`, or None; without `checksums` only by size."""
        for name, file in self.files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != file.size:
                return f"{name} has {size} bytes instead of {file.size}"
            if checksums and sha256(path) != file.sha256:
                return f"{name} has a wrong checksum"
        return None


def problem_of(directory: Path, recipe: str, *, checksums: bool = False) -> str | None:
    """Why `directory` is not the finished product of `recipe`, in a few words, or None if it is."""
    if not directory.is_dir():
        return "it does not exist"
    try:
        manifest = msgspec.json.decode((directory / NAME).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return f"it has no {NAME}"
    except msgspec.MsgspecError as error:
        return f"its {NAME} cannot be read ({error})"
    if manifest.recipe != recipe:
        return f"it was made by another recipe ({manifest.recipe})"
    return manifest.problem(directory, checksums=checksums)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `path` so that whoever reads it sees the old bytes or the new ones, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def publish(made: Path, target: Path) -> None:
    """Moves the finished directory `made` to `target` (same file system), replacing what was there.

    A process that has files of the old one open keeps them. Everybody may read the new ones: safetensors
    writes 0600, and the service runs as another user. Their bytes are on the disk before their directory
    has its name: after a power cut they would else have the right sizes and hold zeros.
    """
    for path in made.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds an exclusive lock on `path`. Blocks while another process has it, having called `waiting`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def need_space(directory: Path, needed: int) -> None:
    """Raises CheckpointError unless `needed` bytes are free where `directory` (which exists) is."""
    if (free := shutil.disk_usage(directory).free) < needed:
        raise CheckpointError(
            f"{directory} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; "
            "free some, or set CITADEL_CACHE_DIR to a place that has them"
        )
