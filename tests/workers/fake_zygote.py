"""A zygote without vLLM: forks fake engines, in the way the real one does.

FAKE_ZYGOTE_FIFO=FIFO    waits for a byte of this FIFO before it says that it is warm
FAKE_ZYGOTE_HELLO=FIFO   what it forks waits for a byte of this FIFO before it says hello
FAKE_ZYGOTE_EXIT=CODE    exits instead of becoming warm
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import msgspec
import setproctitle

from citadel_supervisor.workers.parentage import die_with_parent
from citadel_supervisor.workers.zygote_process import CHANNEL_FD, MESSAGE_MAX, ZygoteReady
from tests import fake_engine


def main() -> None:
    started = time.monotonic()
    setproctitle.setproctitle("citadel: fake zygote")
    die_with_parent(int(sys.argv[1]))
    channel = socket.socket(fileno=CHANNEL_FD)
    if "FAKE_ZYGOTE_EXIT" in os.environ:
        os._exit(int(os.environ["FAKE_ZYGOTE_EXIT"]))
    if "FAKE_ZYGOTE_FIFO" in os.environ:
        with open(os.environ["FAKE_ZYGOTE_FIFO"], "rb", buffering=0) as gate:
            gate.read(1)
    channel.send(msgspec.json.encode(ZygoteReady(time.monotonic() - started, 1)))
    while True:
        data, descriptors, _flags, _address = socket.recv_fds(channel, MESSAGE_MAX, 2)
        if not data:
            os._exit(0)
        _fork(data, descriptors, channel)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork(spec: bytes, descriptors: list[int], channel: socket.socket) -> None:
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    channel.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    status, output = descriptors
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(status, fake_engine.STATUS_FD)
    sys.argv[1:] = [spec.decode()]
    if "FAKE_ZYGOTE_HELLO" in os.environ:
        os.read(os.open(os.environ["FAKE_ZYGOTE_HELLO"], os.O_RDWR), 1)
    fake_engine.main()


if __name__ == "__main__":
    main()
