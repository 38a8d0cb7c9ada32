"""The zygote: a warm process that has vLLM imported and forks workers on request.

Run by the daemon as `python -m citadel_supervisor.workers.zygote_process` with a SOCK_SEQPACKET
socket as descriptor 3. It has one thread and no event loop, since it forks. It ends when the socket
closes or the daemon dies. Workers are forked twice, so that the daemon, a child subreaper, becomes
their parent: they outlive a zygote that is killed and die with the daemon.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

import msgspec
import setproctitle

from citadel_supervisor.workers.engine import preload, run_generation
from citadel_supervisor.workers.launch import LaunchSpec
from citadel_supervisor.workers.parentage import die_with_parent

CHANNEL_FD = 3
MESSAGE_MAX = 256 * 1024


class ZygoteReady(msgspec.Struct, frozen=True):
    """The first message from the zygote. `preload_s` is seconds of imports."""

    preload_s: float
    threads: int


def main() -> NoReturn:
    """Preload, say so, then fork a worker for each spec that comes with its two descriptors."""
    started = time.monotonic()
    supervisor = int(sys.argv[1])
    setproctitle.setproctitle("citadel: zygote (loading)")
    die_with_parent(supervisor)
    channel = socket.socket(fileno=CHANNEL_FD)
    parser = preload(tuple(name for name in sys.argv[2:] if name.strip()))
    setproctitle.setproctitle("citadel: zygote")
    ready = ZygoteReady(time.monotonic() - started, len(os.listdir("/proc/self/task")))
    channel.send(msgspec.json.encode(ready))
    while True:
        data, descriptors, _flags, _address = socket.recv_fds(channel, MESSAGE_MAX, 2)
        if not data:
            os._exit(0)
        _fork_worker(msgspec.json.decode(data, type=LaunchSpec), descriptors, channel, parser)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_worker(spec: LaunchSpec, descriptors: list[int], channel: socket.socket, parser: Any) -> None:
    status, output = descriptors
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    channel.close()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    run_generation(spec, status, parser)


if __name__ == "__main__":
    main()
