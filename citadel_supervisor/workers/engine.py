"""The engine: vLLM's AsyncLLM and its own OpenAI app on a unix socket.

The only module that imports vllm, and only inside functions: it runs in worker processes (forked
from the zygote, or as `python -m citadel_supervisor.workers.engine` when spawned), never in the
daemon. Two processes a worker: the API process, and the engine core that vLLM forks from it and that
holds the weights and the KV cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec
import setproctitle

from citadel_supervisor.errors import CannotEverStart, WorkerExit
from citadel_supervisor.workers.launch import (
    Core,
    Fatal,
    Hello,
    LaunchSpec,
    Loading,
    Report,
    Serving,
    encode_report,
)
from citadel_supervisor.workers.parentage import await_adoption, die_with_parent, pass_on_to_children

STATUS_FD = "CITADEL_STATUS_FD"
TITLE = "CITADEL_CORE_TITLE"
"""Environment variables by which the engine core, made by vLLM, finds the status pipe and its name."""


def report(item: Report) -> None:
    """Write one line to the status pipe; nothing happens where there is none."""
    descriptor = os.environ.get(STATUS_FD)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.write(int(descriptor), encode_report(item))


PRELOADED = (
    "compressed_tensors.quantization",
    "model_hosting_container_standards.sagemaker",
    "prometheus_fastapi_instrumentator",
    "pydantic.v1",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.anthropic.serving",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.launcher",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.scale_out.factories",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.metrics.reader",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "citadel_supervisor.workers.engine_core",
)
"""What a worker of vLLM 0.32 has imported by the time it serves and does not import with something else
here; one that another version lacks is left out."""


def preload(architectures: tuple[str, ...]) -> Any:
    """Import what every worker needs and return vLLM's argument parser.

    Takes 6 to 7 s once. Starts no Python thread and no event loop, so the process may fork after it.
    An architecture vLLM does not know is left for the worker to refuse.
    """
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for architecture in architectures:
        lazy = ModelRegistry.models.get(architecture)
        if lazy is not None:
            # Registered as a class, it is inspected here; by name, in a subprocess that takes 8 s.
            ModelRegistry.register_model(architecture, lazy.load_model_cls())
    if current_platform.is_cpu():
        # A scan of every module for kernels to replace, 0.5 s: once here, not in each engine core.
        current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    parser = make_arg_parser(FlexibleArgumentParser())
    gc.collect()
    gc.freeze()
    return parser


def run_generation(spec: LaunchSpec, status_fd: int, parser: Any | None) -> NoReturn:
    """Be the API process of one generation until told to stop; never returns.

    Expects to be the leader of its own session with signal handlers at their defaults. Reports on
    `status_fd`. Exits with a `WorkerExit`.
    """
    os.environ[STATUS_FD] = str(status_fd)
    os.environ[TITLE] = spec.title("engine core")
    os.set_inheritable(status_fd, True)
    setproctitle.setproctitle(spec.title("API"))
    await_adoption(spec.supervisor_pid)
    die_with_parent(spec.supervisor_pid)
    pass_on_to_children()
    report(Hello(os.getpid()))
    try:
        _use_scratch(spec)
        _pin(spec)
        if parser is None:
            parser = preload(())
        args = _parse(parser, spec)
        report(Loading("config"))
        code = asyncio.run(_serve(spec, args))
    except CannotEverStart as error:
        report(Fatal(str(error), permanent=True))
        code = WorkerExit.CANNOT_EVER_START
    except BaseException as error:
        import traceback

        traceback.print_exc()
        report(Fatal(one_line(error), permanent=False))
        code = WorkerExit.ENGINE_DIED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _use_scratch(spec: LaunchSpec) -> None:
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = spec.scratch
    tempfile.tempdir = None


def _pin(spec: LaunchSpec) -> None:
    """Pin this process, and so all it forks, and size torch's thread pool to the cores."""
    if spec.device != "cpu":
        return
    import torch

    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
    # libgomp read OMP_NUM_THREADS when it was loaded: in a fork only this call still counts.
    torch.set_num_threads(spec.threads)
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)


def _parse(parser: Any, spec: LaunchSpec) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    def refuse(message: str) -> NoReturn:
        raise CannotEverStart(f"vLLM refuses the engine arguments: {message}")

    parser.error = refuse
    args: Namespace = parser.parse_args(list(spec.argv))
    args.model = args.model_tag
    if spec.device == "cpu":
        args.worker_cls = "citadel_supervisor.workers.engine_core.ReportingCPUWorker"
        args.load_format = "citadel" if args.load_format == "auto" else args.load_format
    try:
        validate_parsed_serve_args(args)
        validate_api_server_args(args)
    except (ValueError, TypeError, KeyError) as error:
        raise CannotEverStart(f"vLLM refuses the engine arguments: {one_line(error)}") from error
    return args


async def _serve(spec: LaunchSpec, args: Namespace) -> int:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    context = UsageContext.OPENAI_API_SERVER
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(context)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CannotEverStart(f"vLLM refuses the model's configuration: {one_line(error)}") from error
    if spec.device == "cpu":
        # Making the configuration has just forced "spawn" (platforms/cpu.py); nothing here is
        # unsafe to fork: no thread of ours runs, and the engine core must inherit what is loaded.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    if args.enforce_eager:
        # Eager leaves a few functions of the sampler compiled on first use: 2 to 20 s in the middle
        # of the first request that asks for log-probabilities, to save microseconds.
        import torch._dynamo.config

        torch._dynamo.config.disable = True
    engine = AsyncLLM.from_vllm_config(
        config, usage_context=context, disable_log_stats=args.disable_log_stats
    )
    with _exit_with_core():
        await _serve_app(spec, args, engine)
    engine.shutdown(timeout=0)
    return WorkerExit.OK


@contextlib.contextmanager
def _exit_with_core() -> Iterator[None]:
    """End this process the moment the engine core ends, before a request is answered for it.

    The stock server stays up 3 to 7 s longer and then exits with 0.
    """
    loop = asyncio.get_running_loop()
    watches = [os.pidfd_open(child.pid) for child in multiprocessing.active_children() if child.pid]
    for watch in watches:
        loop.add_reader(watch, os._exit, WorkerExit.ENGINE_DIED)
    yield
    for watch in watches:
        loop.remove_reader(watch)
        os.close(watch)


async def _serve_app(spec: LaunchSpec, args: Namespace, engine: Any) -> None:
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    report(Loading("serving"))
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            report(Serving())

    server = Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=3600,  # the only client is the supervisor's own pool
            timeout_graceful_shutdown=max(1, int(spec.stop_grace_s) - 1),
        )
    )
    app.state.server = server
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(spec.socket)
    os.chmod(spec.socket, 0o600)
    await server.serve(sockets=[listener])


def one_line(error: BaseException) -> str:
    """The error's first telling line; pydantic's start with a count, so the next one is taken too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3]) if lines else type(error).__name__
    return f"{type(error).__name__}: {text}"[:1500]


def core_started() -> None:
    """Called in the engine core as soon as it runs our code: its name, and that it exists."""
    setproctitle.setproctitle(os.environ.get(TITLE, "citadel: engine core"))
    report(Core(os.getpid()))


def main() -> NoReturn:
    """Entry of a spawned worker: the spec is the one argument, the status pipe descriptor 3."""
    run_generation(msgspec.json.decode(sys.argv[1], type=LaunchSpec), 3, None)


if __name__ == "__main__":
    main()
