"""What one generation is given, and the lines it reports back on its status pipe.

The daemon makes a `LaunchSpec` from the configuration; it travels as JSON to the zygote or to a
spawned process. The worker's processes write `Report` lines to a pipe the daemon reads; each line is
shorter than PIPE_BUF, so lines of two processes never mix. End of file means that no process of the
tree is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from citadel_supervisor.config import ModelSettings

AUTO_NAME = "auto"
"""The name every engine answers to besides its own, so that the router never rewrites a body."""

STATUS_LINE_MAX = 4000
"""PIPE_BUF is 4096 on Linux: a write up to that size is atomic."""


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One generation: which model, where it serves, on which cores, with which engine arguments."""

    model: str
    generation: int
    socket: str
    """Path of the unix socket the engine's API is to listen on."""
    scratch: str
    """A directory of this generation alone, for everything temporary; removed after its end."""
    cache: str
    """A directory that outlives generations: compiled kernels, model inspections."""
    cpus: tuple[int, ...]
    threads: int
    argv: tuple[str, ...]
    """Arguments as for `vllm serve`."""
    device: Literal["cpu", "cuda"]
    supervisor_pid: int
    stop_grace_s: float

    def title(self, part: str) -> str:
        """The name of a process of this generation in `ps`."""
        return f"citadel: {self.model} {part} (generation {self.generation})"


Phase = Literal["process", "config", "weights", "kv_cache", "warm_up", "serving"]


class Hello(msgspec.Struct, frozen=True, tag_field="report", tag="hello"):
    """The API process exists and is bound to the daemon's life."""

    pid: int


class Core(msgspec.Struct, frozen=True, tag_field="report", tag="core"):
    """The engine core process exists."""

    pid: int


class Loading(msgspec.Struct, frozen=True, tag_field="report", tag="loading"):
    """Loading got somewhere. `done` and `total` are bytes of weights, 0 in other phases."""

    phase: Phase
    done: int = 0
    total: int = 0


class Serving(msgspec.Struct, frozen=True, tag_field="report", tag="serving"):
    """The engine's API accepts connections."""


class Fatal(msgspec.Struct, frozen=True, tag_field="report", tag="fatal"):
    """The process is about to exit. `permanent`: no restart will help."""

    message: str
    permanent: bool


Report = Hello | Core | Loading | Serving | Fatal

_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
_encoder = msgspec.json.Encoder()


def decode_report(line: bytes) -> Report:
    """One line of the status pipe. Raises msgspec.DecodeError for anything else."""
    try:
        return _decoder.decode(line)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error


def encode_report(report: Report) -> bytes:
    """One line, newline included, at most STATUS_LINE_MAX bytes (a long message is cut)."""
    if isinstance(report, Fatal):  # a path in it may hold bytes that are no text
        message = report.message.encode("utf-8", "backslashreplace").decode()
        report = Fatal(message, report.permanent)
    line = _encoder.encode(report)
    if len(line) > STATUS_LINE_MAX and isinstance(report, Fatal):
        line = _encoder.encode(Fatal(report.message[: STATUS_LINE_MAX // 8], report.permanent))
    return line + b"\n"


def engine_argv(model_id: str, model: ModelSettings) -> tuple[str, ...]:
    """The `vllm serve` arguments of one model: its settings, then its own `engine_args`."""
    arguments: dict[str, object] = {
        "served-model-name": [model_id, *model.aliases, AUTO_NAME],
        "dtype": model.dtype,
        "max-model-len": model.max_model_len,
        "max-num-batched-tokens": model.max_num_batched_tokens,
        "max-num-seqs": model.max_num_seqs,
        "kv-cache-memory-bytes": model.kv_cache,
        "kv-cache-dtype": model.kv_cache_dtype,
        "enable-chunked-prefill": True,
        "enable-request-id-headers": True,
        "disable-fastapi-docs": True,
        "disable-uvicorn-access-log": True,
        "no-enable-log-requests": True,
    }
    if model.device == "cpu":
        arguments["distributed-executor-backend"] = "uni"
    if not model.compile:
        arguments["enforce-eager"] = True
    if model.tool_call_parser is not None:
        arguments |= {"enable-auto-tool-choice": True, "tool-call-parser": model.tool_call_parser}
    template = model.chat_template or _own_template(model.checkpoint_path)
    if template is not None:
        arguments["chat-template"] = template
    own = {name.replace("_", "-").lstrip("-"): value for name, value in model.engine_args.items()}
    return (str(model.checkpoint_path), *_flags(arguments | own))


def _own_template(checkpoint: Path) -> Path | None:
    """The checkpoint's chat template where it is one plain file of a text model.

    Naming it spares the engine to look for a multi-modal processor, which reads the tokenizer again.
    """
    template = checkpoint / "chat_template.jinja"
    others = ("additional_chat_templates", "processor_config.json", "preprocessor_config.json")
    plain = template.is_file() and not any((checkpoint / name).exists() for name in others)
    return template if plain else None


def _flags(arguments: Mapping[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={msgspec.json.encode(value).decode()}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def engine_environment(
    base: Mapping[str, str], *, threads: int | None, cache: Path, scratch: Path, preload: str
) -> dict[str, str]:
    """The environment of a process that runs vLLM, made from `base`.

    `threads`: OpenMP threads, or None where that is set later (the zygote). `preload`: LD_PRELOAD.
    """
    environment = {name: value for name, value in base.items() if not name.startswith(("VLLM_", "CITADEL_"))}
    for name in (
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
    ):
        environment.pop(name, None)
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(scratch),
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_USE_AOT_COMPILE": "0",  # the ahead-of-time cache can never be loaded on CPU in 0.32
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the CPU platform keep the executor "uni"
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # we pin; its own binding puts every engine on core 0
        "OMP_WAIT_POLICY": "passive",
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # 0.3 to 0.4 GiB less slack with quantised weights
        "VLLM_LOGGING_COLOR": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if preload:
        environment["LD_PRELOAD"] = preload
    return environment
