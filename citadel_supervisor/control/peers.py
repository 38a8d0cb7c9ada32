"""Who is at the other end of a unix socket, and whether they may command the daemon."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass

from citadel_supervisor.errors import ConfigError

_UCRED = struct.Struct("iII")
_GID = struct.Struct("I")
_SO_PEERGROUPS = 59
"""Since Linux 4.13; Python has no name for it."""
_OPTION_BYTES = 1024
"""The longest socket option that Python reads: 256 groups."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected process, by the kernel's word at the time it connected."""

    uid: int
    pid: int
    groups: frozenset[int] = frozenset()
    """Its primary and supplementary gids."""


def peer_of(connection: int) -> Peer:
    """The peer of a connected unix socket, given by descriptor, which stays open. Raises OSError."""
    # A duplicate, because event loops hand out look-alikes of a socket and not all can be asked.
    with socket.fromfd(connection, socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
        return Peer(uid, pid, frozenset({gid, *_supplementary(sock, uid, gid)}))


def _supplementary(sock: socket.socket, uid: int, gid: int) -> list[int]:
    """From the kernel, which knows them without a look-up that may block and agrees with file modes."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _OPTION_BYTES)
    except OSError:  # more than 256 groups
        try:
            return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:
            return []
    return [one for (one,) in _GID.iter_unpack(raw)]


@dataclass(frozen=True, slots=True)
class Gate:
    """Who may use the control socket: root, `uid`, and members of the group."""

    uid: int
    group: str | None = None
    gid: int | None = None

    @classmethod
    def for_group(cls, group: str | None) -> Gate:
        """The gate of this process's user and of `group`. Raises ConfigError for a group not on this host."""
        if group is None:
            return cls(os.geteuid())
        try:
            return cls(os.geteuid(), group, grp.getgrnam(group).gr_gid)
        except KeyError:
            problem = f"control.group: this host has no group '{group}'; create it with 'groupadd -r {group}'"
            raise ConfigError("configuration", [problem]) from None

    def admits(self, peer: Peer) -> bool:
        return peer.uid in (0, self.uid) or self.gid in peer.groups

    def refusal(self, peer: Peer) -> str:
        """Why `peer` is not admitted, and what to do. Looks no names up: that may block."""
        allowed = f"uid {peer.uid} may not control this supervisor: root and uid {self.uid} may"
        if self.group is None:
            return allowed + "; set control.group to let a group"
        return f"{allowed}, and members of group '{self.group}'; join it with 'usermod -aG {self.group} USER'"
