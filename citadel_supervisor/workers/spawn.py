"""Making a process: the plain way, and what both ways share.

`posix_spawn` and not `subprocess`: nothing else in this process may wait for our children, and only
the descriptors named here reach the child.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from citadel_supervisor.errors import LaunchError
from citadel_supervisor.workers.launch import LaunchSpec

ENGINE_MODULE = "citadel_supervisor.workers.engine"


def spawn_python(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], *, channel: int, output: int,
    python: Path | None = None,
) -> int:  # fmt: skip
    """Start `python -m module` as the leader of a session; returns its pid.

    `channel` becomes its descriptor 3, `output` its standard output and error. Raises LaunchError.
    """
    executable = str(python or sys.executable)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
        (os.POSIX_SPAWN_DUP2, channel, 3),
    ]
    argv = [executable, "-m", module, *arguments]
    try:
        return os.posix_spawn(
            executable, argv, dict(environment), file_actions=actions, setsid=True, setsigmask=()
        )
    except OSError as error:
        raise LaunchError(f"cannot start {executable}: {error.strerror}") from error


def spawn_worker(
    spec: LaunchSpec, environment: Mapping[str, str], *, status: int, output: int, python: Path | None
) -> int:
    """Start one generation without the zygote; returns its pid. Raises LaunchError."""
    argument = msgspec.json.encode(spec).decode()
    return spawn_python(ENGINE_MODULE, [argument], environment, channel=status, output=output, python=python)


def preload_libraries() -> str:
    """LD_PRELOAD for processes that run vLLM: torch's libgomp and, where it is bundled, tcmalloc.

    Without the first only one core is used once threads are pinned. Imports neither package.
    """
    found: list[Path] = []
    for package, places in (("vllm", ("libs",)), ("torch", ("../torch.libs", "lib"))):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        pattern = "libtcmalloc*.so*" if package == "vllm" else "libgomp*.so*"
        for place in places:
            libraries = sorted((root / place).resolve().glob(pattern))
            if libraries:
                found.append(libraries[0])
                break
    return ":".join(map(str, found))
