"""`python -m citadel_supervisor` is the command `citadel-supervisor`."""

from __future__ import annotations

from citadel_supervisor.daemon_main import main

if __name__ == "__main__":
    main(prog_name="citadel-supervisor")
