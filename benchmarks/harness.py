"""What the benchmarks share: systems under test started and ended, questions asked, results written."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from citadel_supervisor.checkpoints.cache import checkpoint_dir

CHECKPOINT = checkpoint_dir("SmolLM2-135M-Instruct")
MODELS = ("mixtral-8x7b", "hermes-2", "openchat-3.5", "phi-3-mini")
RESULTS = Path(__file__).parent / "results"
KV_CACHE = 256 * 1024**2
MAX_MODEL_LEN = 2048


def free_ports(count: int) -> list[int]:
    """Ports that are free now, on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ask(port: int, model: str, timeout_s: float = 120.0) -> bool:
    """Whether the server gives a good answer to a short chat request."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Name the capital of France."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    try:
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=timeout_s)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and "Paris" in answer.json()["choices"][0]["message"]["content"]


def until_answered(port: int, model: str, limit_s: float = 300.0) -> float:
    """Ask until a good answer comes; the monotonic time at which it came."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if ask(port, model):
            return time.monotonic()
        time.sleep(0.05)
    raise TimeoutError(f"no good answer on port {port} within {limit_s:g} s")


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def memory(pids: list[int]) -> dict[str, float]:
    """Processes, proportional and resident memory in MB of all the trees below `pids` together."""
    processes = {process.pid: process for pid in pids for process in tree(pid)}
    full = []
    for process in processes.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            full.append(process.memory_full_info())
    return {
        "processes": len(full),
        "pss_mb": round(sum(info.pss for info in full) / 1e6, 1),
        "rss_mb": round(sum(info.rss for info in full) / 1e6, 1),
    }


@dataclass
class Ours:
    """A running citadel-supervisor with four slots on the demo weights."""

    process: subprocess.Popen[bytes]
    directory: Path
    ports: dict[str, int]

    def status(self) -> dict[str, Any]:
        """What `citadelctl status --json` says."""
        transport = httpx.HTTPTransport(uds=str(self.directory / "run" / "control.sock"))
        with httpx.Client(transport=transport, timeout=10) as client:
            status: dict[str, Any] = client.get("http://citadel/v1/status").json()
            return status


@contextlib.contextmanager
def ours(models: tuple[str, ...] = MODELS, **workers: Any) -> Iterator[Ours]:
    """Start a supervisor; ended at the end."""
    numbers = free_ports(len(models) + 3)
    ports = dict(zip([*models, "router", "metrics", "health"], numbers, strict=True))
    with tempfile.TemporaryDirectory(prefix="citadel-bench-") as place:
        directory = Path(place)
        config = {
            "state_dir": str(directory / "state"),
            "runtime_dir": str(directory / "run"),
            "log_dir": str(directory / "logs"),
            "gateway": {f"{name}_port": ports[name] for name in ("router", "metrics", "health")},
            "workers": {"oversubscribe": True, **workers},
            "models": {
                name: {
                    "port": ports[name],
                    "checkpoint": str(CHECKPOINT),
                    "kv_cache": KV_CACHE,
                    "max_model_len": MAX_MODEL_LEN,
                }
                for name in models
            },
        }
        file = directory / "citadel.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "citadel_supervisor", "--config", str(file), "run"]
        log = (directory / "stderr").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Ours(process, directory, ports)
        finally:
            end([process])


@dataclass
class Stock:
    """vLLM's own OpenAI servers, one a model, as four systemd units would run them."""

    directory: Path
    ports: dict[str, int]
    extra: tuple[str, ...] = ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, model: str) -> None:
        """Start, or start again, one server."""
        command = [
            sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(CHECKPOINT),
            "--served-model-name", model, "--host", "127.0.0.1", "--port", str(self.ports[model]),
            "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN),
            "--kv-cache-memory-bytes", str(KV_CACHE), *self.extra,
        ]  # fmt: skip
        log = (self.directory / f"{model}.log").open("ab")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.processes[model] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def engine_core(self, model: str) -> int:
        """The pid of one server's engine core."""
        below = tree(self.processes[model].pid)[1:]
        return next(process.pid for process in below if "EngineCore" in " ".join(process.cmdline()))


@contextlib.contextmanager
def stock(models: tuple[str, ...] = MODELS, extra: tuple[str, ...] = ()) -> Iterator[Stock]:
    """Stock servers, not started yet; ended at the end."""
    with tempfile.TemporaryDirectory(prefix="stock-bench-") as place:
        servers = Stock(Path(place), dict(zip(models, free_ports(len(models)), strict=True)), extra)
        try:
            yield servers
        finally:
            end(list(servers.processes.values()))


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, then SIGKILL to whatever is left of the trees; only processes started here."""
    members = [member for process in processes for member in tree(process.pid)]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    psutil.wait_procs(members, timeout=20)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                member.kill()
    for process in processes:
        process.wait(timeout=20)


def write(name: str, result: dict[str, Any]) -> None:
    """Keep a result as JSON beside what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    model_name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    host = {
        "cpu": model_name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    document = {"benchmark": name, "measured": time.strftime("%Y-%m-%d"), "host": host, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
