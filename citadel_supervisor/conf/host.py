"""What `check` needs to know of this host."""

from __future__ import annotations

import errno
import importlib.util
import socket
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from citadel_supervisor.topology import read_topology


@dataclass(frozen=True, slots=True)
class Host:
    """A host. `memory` is in bytes, `refused` has a reason for each address that cannot be bound."""

    cpus: tuple[int, ...]
    memory: int
    amx: bool
    """Whether its CPUs have AMX tiles."""
    engine: bool
    """Whether vLLM is installed in this environment."""
    running: bool = False
    """Whether a supervisor answers on the configuration's control socket."""
    refused: dict[tuple[str, int], str] = field(default_factory=dict)

    def refusal(self, address: str, port: int) -> str:
        """Why `port` cannot be bound; empty where it can, or where it is the running supervisor's."""
        return "" if self.running else self.refused.get((address, port), "")


def read_host(address: str, ports: list[int], control_socket: Path) -> Host:
    """This host, with each port bound for a moment to see whether it can be. Blocks for milliseconds."""
    running = _answers(control_socket)
    refused = {} if running else {(address, port): _refusal(address, port) for port in ports if port}
    return Host(
        cpus=read_topology().cpus,
        memory=psutil.virtual_memory().total,
        amx=_has_amx(Path("/proc/cpuinfo")),
        engine=importlib.util.find_spec("vllm") is not None,
        running=running,
        refused={key: why for key, why in refused.items() if why},
    )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return True


def _refusal(address: str, port: int) -> str:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        return f"gateway.host {address!r} means nothing on this host: {error.strerror}"
    with socket.socket(family, kind, protocol) as probe:
        # As the daemon does: connections of a daemon that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} on {address} is held by {_holder(port)}"
            return f"port {port} on {address} cannot be bound: {(error.strerror or str(error)).lower()}"
    return ""


def _holder(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    try:
        for found in psutil.net_connections(kind="tcp"):
            listens = found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port
            if listens and found.pid is not None:
                return f"pid {found.pid} ({psutil.Process(found.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return "another process"


def _has_amx(cpuinfo: Path) -> bool:
    try:
        return "amx_tile" in cpuinfo.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
