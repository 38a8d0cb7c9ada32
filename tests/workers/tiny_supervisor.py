"""A supervisor and nothing else, to be killed.

    python -m tests.workers.tiny_supervisor RUN_DIR PYTHON FLAG=VALUE...

Prints the pids of its worker's processes as JSON once that is ready, and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import uvloop

from citadel_supervisor.workers.parentage import become_subreaper
from citadel_supervisor.workers.process import end_survivors
from tests.workers.rig import make_rig


async def main(run_dir: Path, python: str, flags: list[str]) -> None:
    become_subreaper()
    survivors = await end_survivors(run_dir)
    env = dict(flag.split("=", 1) for flag in flags)
    rig = make_rig(run_dir, {"alpha": {"python": python, "env": env}})
    await rig.run()
    seen = await rig.ready()
    sys.stdout.write(json.dumps({"pids": [seen.pid, seen.core_pid], "survivors": survivors}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
