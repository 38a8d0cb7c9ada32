"""Dying with the supervisor: parent-death signals, set and checked. Runs in worker processes.

The kernel sends the signal when the *thread* that is the parent ends, and it does not reach
grandchildren; so every process of a tree sets its own, and a process that was made while its parent
was already dying finds that out by asking for its parent afterwards.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

from citadel_supervisor.errors import WorkerExit

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def become_subreaper() -> None:
    """Orphans below this process become its children, not init's."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` ends. Exits at once if it is no longer the parent."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(WorkerExit.ORPHANED)


def await_adoption(parent: int, patience_s: float = 10.0) -> None:
    """Return once `parent` is this process's parent; exit if that does not happen.

    A worker forked from the zygote is the child of a short-lived process; when that ends the kernel
    hands the worker to the supervisor. Blocks for at most `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while os.getppid() != parent:
        if time.monotonic() > deadline:
            os._exit(WorkerExit.ORPHANED)
        time.sleep(0.0005)


def pass_on_to_children() -> None:
    """From now on every process forked below this one dies with the one that forked it."""
    forking = [os.getpid()]

    def before() -> None:
        forking[0] = os.getpid()

    os.register_at_fork(before=before, after_in_child=lambda: die_with_parent(forking[0]))
