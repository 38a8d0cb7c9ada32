"""citadelctl: the operator's command over the control socket."""

from citadel_supervisor.cli.commands import main

__all__ = ["main"]
