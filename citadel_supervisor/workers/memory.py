"""Memory of process trees, as the kernel accounts it. Blocking: call it in a thread."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from citadel_supervisor.workers.process import process_table, tree_of

PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


def proportional_set_size(pid: int) -> int:
    """Bytes of one process, shared pages divided among those who share them; 0 when it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return 0
    match = PSS.search(rollup)
    return int(match[1]) * 1024 if match else 0


def tree_memory(leaders: Mapping[str, int | None]) -> dict[str, int]:
    """Bytes of each leader's whole tree; 0 where there is none. Some 10 ms a process of a gigabyte."""
    table = process_table()
    return {
        name: sum(proportional_set_size(entry.pid) for entry in tree_of(pid, table)) if pid is not None else 0
        for name, pid in leaders.items()
    }
