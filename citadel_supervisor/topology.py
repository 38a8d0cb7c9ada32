"""What this process may use of the host's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """Logical CPUs, by number, that workers may be placed on."""

    cpus: tuple[int, ...]


def read_topology() -> Topology:
    """This process's affinity mask, which a cpuset or `taskset` may have narrowed."""
    return Topology(tuple(sorted(os.sched_getaffinity(0))))
