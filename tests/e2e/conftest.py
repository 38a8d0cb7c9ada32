"""Daemons for tests: one with four real engines that most tests share, and small ones of a test's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.daemon import DEMO_FILE, MODELS, Daemon

QUICK_HEALTH = {
    "CITADEL_WORKERS__HEALTH__STALL_S": "3",
    "CITADEL_WORKERS__HEALTH__CHECK_INTERVAL_S": "0.2",
    "CITADEL_WORKERS__BACKOFF__RESTARTS": "100",
    "CITADEL_WORKERS__BACKOFF__MAXIMUM_S": "1",
}
FREE_PORTS = {
    f"CITADEL_{name}": "0"
    for name in (
        "GATEWAY__ROUTER_PORT",
        "GATEWAY__METRICS_PORT",
        "GATEWAY__HEALTH_PORT",
        *(f"MODELS__{model.upper().replace('-', '_').replace('.', '_')}__PORT" for model in MODELS),
    )
}
SMALL_ENGINE = {
    # So that two requests fill it, and that a prefill is many steps: between two it can be told to stop.
    "CITADEL_MODELS__PHI_3_MINI__MAX_NUM_SEQS": "2",
    "CITADEL_MODELS__PHI_3_MINI__MAX_NUM_BATCHED_TOKENS": "64",
}


class Measured:
    """Figures that the tests came upon, shown at the end of the run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def left(self, phase: str, way: str, seconds: float) -> None:
        """How long an engine went on for a client that had left."""
        self.tell(f"client left {phase} by {way}: its engine had stopped after {seconds * 1000:.0f} ms")


MEASURED = pytest.StashKey[Measured]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = Measured()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash.get(MEASURED, None)
    if measured is not None and measured.lines:
        terminalreporter.section("measured")
        for line in measured.lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Measured:
    return pytestconfig.stash.setdefault(MEASURED, Measured())


@pytest.fixture(scope="session")
def demo() -> Iterator[Daemon]:
    """The four slots of etc/demo.yaml. Shared: begin with `await demo.ready()`, and leave it able to be."""
    place = Path(tempfile.mkdtemp(prefix="citadel-e2e-"))
    config = place / "demo.yaml"
    shutil.copy(DEMO_FILE, config)
    daemon = Daemon(place, config, QUICK_HEALTH | FREE_PORTS | SMALL_ENGINE)
    daemon.start()
    yield daemon
    daemon.end()
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def make_daemon() -> Iterator[Callable[[Callable[[Path], Path]], Daemon]]:
    """`make_daemon(write)`: a daemon that is not started; `write(place)` writes its configuration."""
    made: list[Daemon] = []

    def make(write: Callable[[Path], Path], **env: str) -> Daemon:
        place = Path(tempfile.mkdtemp(prefix="citadel-e2e-"))
        made.append(Daemon(place, write(place), env))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()
        shutil.rmtree(daemon.place)
