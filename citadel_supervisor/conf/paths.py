"""Where the daemon keeps things when nothing is configured, and where others find it. Stdlib only.

Under systemd the unit's own directories come first (`$STATE_DIRECTORY` and its like): there the daemon
runs as a user of its own. By hand, root gets the system's places and everyone else their own.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_RUNTIME = Path("/run/citadel")
SYSTEM_STATE = Path("/var/lib/citadel")
SYSTEM_LOGS = Path("/var/log/citadel")
DEFAULT_CONFIG = Path("/etc/citadel/citadel.yaml")


def default_state_dir() -> Path:
    """systemd's, else `/var/lib/citadel` for root, else below the user's state directory."""
    given = _from_systemd("STATE_DIRECTORY")
    if given is not None:
        return given
    if os.geteuid() == 0:
        return SYSTEM_STATE
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(base) / "citadel-supervisor"


def default_runtime_dir(state_dir: Path) -> Path:
    """systemd's, else `/run/citadel` for root, else under `$XDG_RUNTIME_DIR`, else in the state directory."""
    given = _from_systemd("RUNTIME_DIRECTORY")
    if given is not None:
        return given
    if os.geteuid() == 0:
        return SYSTEM_RUNTIME
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "citadel" if base else state_dir / "run"


def default_log_dir(state_dir: Path) -> Path:
    """systemd's, else `/var/log/citadel` where the state is in the system's place, else beside the state."""
    given = _from_systemd("LOGS_DIRECTORY")
    if given is not None:
        return given
    return SYSTEM_LOGS if state_dir == SYSTEM_STATE else state_dir / "logs"


def control_socket(explicit: str | None = None, system: Path = SYSTEM_RUNTIME) -> Path:
    """The control socket to talk to: `explicit`, else `$CITADEL_SOCKET`, else the one that exists.

    One's own daemon comes before the system's. Where neither socket is there, the path is the one that
    a daemon started by this user would make.
    """
    named = explicit or os.environ.get("CITADEL_SOCKET")
    if named:
        return Path(named)
    own = default_runtime_dir(default_state_dir()) / "control.sock"
    shared = system / "control.sock"
    return shared if _present(shared) and not _present(own) else own


def _from_systemd(variable: str) -> Path | None:
    """The first directory of the colon-separated list that systemd sets."""
    first = os.environ.get(variable, "").partition(":")[0]
    return Path(first) if first else None


def _present(path: Path) -> bool:
    """Whether `path` exists, as far as can be seen.

    A directory that one may not enter counts: "permission denied" then tells an operator who is not in
    the control group more than a path in their own home would.
    """
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True
