"""Cold start of four models, recovery from `kill -9` of an engine core, and memory: ours beside stock.

    python -m benchmarks.bench_start

Both serve the same weights with the same settings (eager, 256 MiB of KV cache each), one after the
other in one run. Stock is vLLM's own OpenAI server, four of them started together; when its engine
core is killed it is started again the moment it has exited, as a unit with Restart=always and no
delay would. Each time ends with a good answer to a chat request, not with a health check.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import MODELS, memory, ours, stock, until_answered, write

VICTIM = "phi-3-mini"
KILLS = 3


def measure_ours() -> dict[str, Any]:
    """Seconds from starting the daemon to four good answers, and from each kill to the next answer."""
    began = time.monotonic()
    with ours() as system:
        with ThreadPoolExecutor(len(MODELS)) as pool:
            answered = list(pool.map(lambda name: until_answered(system.ports[name], name), MODELS))
        start_s = max(answered) - began
        recoveries = []
        for _ in range(KILLS):
            core = system.status()["models"][VICTIM]["core_pid"]
            killed = time.monotonic()
            os.kill(core, signal.SIGKILL)
            recoveries.append(until_answered(system.ports[VICTIM], VICTIM) - killed)
        status = system.status()
        workers = [model["pid"] for model in status["models"].values()]
        daemon = memory([status["pid"]])
        return {
            "four_models_s": round(start_s, 2),
            "recovery_s": [round(value, 2) for value in recoveries],
            "daemon_rss_mb": round(status["memory_bytes"] / 1e6, 1),
            "everything": daemon,
            "workers": memory(workers),
        }


def measure_stock() -> dict[str, Any]:
    """The same of four stock servers."""
    with stock() as system:
        began = time.monotonic()
        for name in MODELS:
            system.start(name)
        with ThreadPoolExecutor(len(MODELS)) as pool:
            answered = list(pool.map(lambda name: until_answered(system.ports[name], name), MODELS))
        start_s = max(answered) - began
        recoveries = []
        for _ in range(KILLS):
            killed = time.monotonic()
            os.kill(system.engine_core(VICTIM), signal.SIGKILL)
            system.processes[VICTIM].wait(timeout=120)
            system.start(VICTIM)
            recoveries.append(until_answered(system.ports[VICTIM], VICTIM) - killed)
        workers = [process.pid for process in system.processes.values()]
        return {
            "four_models_s": round(start_s, 2),
            "recovery_s": [round(value, 2) for value in recoveries],
            "workers": memory(workers),
        }


def main() -> None:
    """Measure, print, keep."""
    console = Console()
    console.print("stock vLLM servers ...")
    theirs = measure_stock()
    console.print("citadel-supervisor ...")
    mine = measure_ours()
    table = Table("", "stock", "citadel", "ratio")

    def row(text: str, stock_value: float, our_value: float, unit: str) -> None:
        ratio = f"{stock_value / our_value:.1f} x"
        table.add_row(text, f"{stock_value:.1f} {unit}", f"{our_value:.1f} {unit}", ratio)

    row("cold start, four models answer", theirs["four_models_s"], mine["four_models_s"], "s")
    middle = KILLS // 2
    stock_recovery, our_recovery = sorted(theirs["recovery_s"])[middle], sorted(mine["recovery_s"])[middle]
    row("kill -9 of an engine core to the next answer (median)", stock_recovery, our_recovery, "s")
    row("memory of the workers (PSS)", theirs["workers"]["pss_mb"], mine["workers"]["pss_mb"], "MB")
    row("processes of the workers", theirs["workers"]["processes"], mine["workers"]["processes"], "")
    table.add_row("resident memory of the daemon", "", f"{mine['daemon_rss_mb']:.1f} MB", "")
    console.print(table)
    ratios = {
        "cold_start": round(theirs["four_models_s"] / mine["four_models_s"], 2),
        "recovery": round(stock_recovery / our_recovery, 2),
        "memory": round(theirs["workers"]["pss_mb"] / mine["workers"]["pss_mb"], 2),
    }
    write("start", {"stock": theirs, "citadel": mine, "stock_over_citadel": ratios})


if __name__ == "__main__":
    main()
