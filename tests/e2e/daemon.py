"""The real daemon as a subprocess, in a directory of its own, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from citadel_supervisor.checkpoints.cache import checkpoint_dir
from citadel_supervisor.workers.process import process_table, tree_of
from tests.conftest import kill_everything_of

Status = dict[str, Any]

MODELS = ("mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini")
DEMO_CHECKPOINT = checkpoint_dir("SmolLM2-135M-Instruct")
DEMO_FILE = Path(__file__).parents[2] / "etc" / "demo.yaml"
PATIENCE_S = 120.0
"""How long a test waits for anything: four engines load in 20 s alone, other work may share the cores."""
POLL_S = 0.05
SETTLED = {"ready", "stopped", "quarantined"}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.out.startswith("{"), (self.out, self.err)
        return json.loads(self.out)


@dataclass(slots=True)
class Daemon:
    """A citadel-supervisor over the directory `place`. It may be started, ended and started again."""

    place: Path
    config: Path
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def runtime(self) -> Path:
        return self.place / "run"

    @property
    def tmp(self) -> Path:
        """The daemon's TMPDIR."""
        return self.place / "tmp"

    @property
    def socket(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def engine_socket(self, model: str, generation: int) -> Path:
        """The private socket of one generation."""
        return self.runtime / "workers" / f"{model}.{generation}.sock"

    def environment(self) -> dict[str, str]:
        """What its commands are run with: nothing of the tester's own settings but where the weights are."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("CITADEL_") or name == "CITADEL_CACHE_DIR"
        }
        own = {
            "CITADEL_STATE_DIR": str(self.place / "state"),
            "CITADEL_RUNTIME_DIR": str(self.runtime),
            "CITADEL_LOG_DIR": str(self.place / "logs"),
            "TMPDIR": str(self.tmp),
        }
        return kept | own | dict(self.env)

    # Processes.

    def start(self) -> None:
        """Start it; it binds its ports within a second or ends."""
        assert self.process is None or self.process.poll() is not None
        self.tmp.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "citadel_supervisor", "--config", str(self.config), "run"]
        with (self.place / "output").open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=self.environment())

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def exit_code(self, seconds: float = PATIENCE_S) -> int:
        """Wait until it has ended."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, seconds)

    def end(self) -> None:
        """End it, however it is, and whatever it made. Blocks."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.process.kill()
            self.process.wait()
        kill_everything_of(self.runtime)

    def tree(self) -> list[psutil.Process]:
        """It and every process below it or in a worker's session. Their identity outlives their pids."""
        table = process_table()
        children = [entry.pid for entry in table.values() if entry.ppid == self.pid]
        pids = {self.pid} | {entry.pid for child in children for entry in tree_of(child, table)}
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def names(self) -> dict[int, str]:
        """What its processes are called, as `ps` shows them, by pid."""
        found = {}
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process.pid] = " ".join(process.cmdline()).strip()
        return found

    def zombies(self) -> list[int]:
        """Ended children that it has not waited for."""
        return [e.pid for e in process_table().values() if e.ppid == self.pid and e.state == "Z"]

    # What it says.

    async def status(self) -> Status:
        """What the control socket answers."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), verify=False)
        async with httpx.AsyncClient(transport=transport, timeout=30) as client:
            answer: Status = (await client.get("http://citadel/v1/status")).json()
            return answer

    async def until(self, wanted: Callable[[Status], object], seconds: float = PATIENCE_S) -> Status:
        """The first status for which `wanted` is true."""
        deadline = time.monotonic() + seconds
        seen: Status = {}
        while time.monotonic() < deadline:
            assert self.running(), f"the daemon has ended:\n{self.output()}"
            try:
                seen = await self.status()
            except httpx.TransportError:
                pass
            else:
                if wanted(seen):
                    return seen
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"not within {seconds:g} s: {json.dumps(seen, indent=1)}\n{self.output()}")

    async def ready(self) -> Status:
        """The status once everything is ready; what another test has stopped or drained is started."""
        if not self.running():
            self.start()
        seen = await self.until(lambda status: all(map(_settled, status["models"].values())))
        for name, model in seen["models"].items():
            if model["state"] != "ready":
                assert (await self.ctl("start", name)).code == 0
        return await self.until(_all_ready)

    async def settled(self) -> Status:
        """The status once every model is ready, stopped or quarantined."""
        return await self.until(lambda status: all(_settled(one) for one in status["models"].values()))

    def output(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.place / "output").read_text()[-6000:]
        return ""

    # Commands and requests.

    async def ctl(self, *words: str, seconds: float = PATIENCE_S) -> Ran:
        """Run citadelctl."""
        process = await self.ctl_process(*words)
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())

    async def events(self) -> list[Status]:
        """The last events, oldest first, as citadelctl prints them."""
        ran = await self.ctl("events", "--json")
        assert ran.code == 0, ran.err
        return [json.loads(line) for line in ran.out.splitlines()]

    async def ctl_process(self, *words: str) -> asyncio.subprocess.Process:
        """citadelctl, running."""
        return await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("citadelctl"), "--socket", self.socket, *words,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment(),
        )  # fmt: skip


def _all_ready(status: Status) -> bool:
    return bool(status["ready"]) and status["zygote"]["state"] in ("ready", "off")


def _settled(model: Status) -> bool:
    return model["state"] in SETTLED or (model["state"] == "draining" and not model["active_requests"])


def write_config(place: Path, models: Mapping[str, Mapping[str, object]], **sections: object) -> Path:
    """A configuration with these models, all ports free ones unless named."""
    sections["gateway"] = {"router_port": 0, "metrics_port": 0, "health_port": 0} | dict(
        sections.get("gateway", {})  # type: ignore[call-overload]
    )
    sections["workers"] = {"oversubscribe": True} | dict(sections.get("workers", {}))  # type: ignore[call-overload]
    sections["models"] = {name: {"port": 0} | dict(model) for name, model in models.items()}
    file = place / "citadel.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def demo_model(**settings: object) -> dict[str, object]:
    """A model served by the demo weights, as etc/demo.yaml has it."""
    return {
        "checkpoint": "cache:SmolLM2-135M-Instruct",
        "dtype": "float32",
        "kv_cache": "96MiB",
        "max_model_len": 2048,
    } | settings


def free_ports(count: int) -> list[int]:
    """Ports that are free now, for a daemon that must get the same ones twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
