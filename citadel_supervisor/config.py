"""The configuration: small frozen sections, read from YAML and the environment by `config_load`.

Every setting has a default or is required with a reason. Environment variables override the file:
`CITADEL_GATEWAY__ROUTER_PORT=9000`, `CITADEL_MODELS__PHI_3_MINI__CORES=2` (a model's id in capitals
with every other character turned into `_`). Secrets have no place here.

Units: sizes are bytes and may be written "512MB", "4GiB" or a plain number; durations end in `_s`
and are seconds. A relative path is taken from the file's own directory. The docstrings of the settings
are what the operator's reference and the JSON schema say about them.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from citadel_supervisor.checkpoints.cache import checkpoint_dir
from citadel_supervisor.conf.paths import (
    SYSTEM_RUNTIME,
    control_socket,
    default_log_dir,
    default_runtime_dir,
    default_state_dir,
)
from citadel_supervisor.conf.rules import MODEL_ID, conflicts, model_conflicts, refuse
from citadel_supervisor.conf.types import (
    Alias,
    Bytes,
    Checkpoint,
    LocalPath,
    Port,
    Seconds,
    Section,
    parse_bytes,
)

__all__ = [
    "MODEL_ID",
    "SYSTEM_RUNTIME",
    "BackoffSettings",
    "ControlSettings",
    "GatewaySettings",
    "HealthSettings",
    "LogSettings",
    "ModelSettings",
    "Objectives",
    "Section",
    "Settings",
    "WorkerSettings",
    "control_socket",
    "default_log_dir",
    "default_runtime_dir",
    "default_state_dir",
    "parse_bytes",
]


class Objectives(Section):
    """Service-level objectives of a model: exported and alerted on, never enforced."""

    latency_avg_s: Seconds | None = None
    """Mean time from request to complete answer."""
    latency_p95_s: Seconds | None = None
    """The time that 95 of 100 requests stay under."""
    requests_per_minute: Annotated[float, Field(allow_inf_nan=False, gt=0)] | None = None
    """Throughput the model should sustain."""


class ModelSettings(Section):
    """One model: its port, its checkpoint and what its engine may use."""

    port: Port
    """The model's own port; 0 takes any free one."""
    checkpoint: Checkpoint
    """A Hugging Face safetensors directory, or "cache:NAME" for one prepared in the cache."""
    enabled: bool = True
    """False: configured but not started, until `citadelctl start`."""
    aliases: tuple[Alias, ...] = ()
    """Other names a request may use for this model."""
    description: str = ""
    """What the model is made for; shown to operators."""
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU cores of its own; its engine runs one thread on each."""
    memory: Bytes = 4 * 1000**3
    """Memory budget of the worker's whole process tree, in bytes."""
    kv_cache: Bytes = 1024**3
    """Bytes of KV cache; resident from the start."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """How the KV cache is stored; fp8 halves it. auto: like `dtype`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """What the engine computes in. auto: what the checkpoint says."""
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    """Longest context, in tokens."""
    max_num_batched_tokens: Annotated[int, Field(ge=16)] = 2048
    """Tokens the engine computes in one step at most (chunked prefill)."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 32
    """Sequences the engine runs at once at most."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Concurrent requests the model is meant for."""
    compile: bool = False
    """Use torch.compile: faster tokens on small models, starts 15 to 60 s later."""
    tool_call_parser: str | None = None
    """vLLM's parser for tool calls ("hermes", "mistral"); null: no automatic tool choice."""
    chat_template: LocalPath | None = None
    """A chat template to use in place of the checkpoint's own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the engine computes; cuda needs the CUDA build of vLLM."""
    launch: Literal["auto", "zygote", "spawn"] = "auto"
    """How its process is made. auto: from the zygote where that can serve it, else a plain spawn."""
    python: LocalPath | None = None
    """An interpreter of another environment to run this engine in; implies spawn."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables for this engine's process alone; implies spawn."""
    engine_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of `vllm serve` by their flag's name, for instance {"seed": 7}."""
    objectives: Objectives = Objectives()
    """What it should achieve."""

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint's directory; it may not exist."""
        scheme, _, name = self.checkpoint.partition("cache:")
        return checkpoint_dir(name) if not scheme and name else Path(self.checkpoint).expanduser()

    @property
    def spawns(self) -> bool:
        """Whether its process must be spawned, not forked from the zygote."""
        if self.launch == "auto":
            return self.device != "cpu" or self.python is not None or bool(self.env)
        return self.launch == "spawn"

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSettings:
        refuse(model_conflicts(self))
        return self


class BackoffSettings(Section):
    """How long to wait between a loss and the next generation, and when to give up."""

    initial_s: Seconds = 0.5
    """The first wait."""
    factor: Annotated[float, Field(allow_inf_nan=False, ge=1)] = 2.0
    """Each wait is so many times the one before."""
    maximum_s: Seconds = 60.0
    """The longest wait."""
    jitter: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)] = 0.2
    """Each wait is drawn from plus or minus this share of it."""
    restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts allowed within `window_s`; one more and the worker is quarantined."""
    window_s: Seconds = 600.0
    """The time over which restarts are counted."""


class HealthSettings(Section):
    """How a worker that lives but does not work is told from a busy one."""

    probe_interval_s: Seconds = 30.0
    """Between two probes of a worker's own health endpoint."""
    probe_timeout_s: Seconds = 10.0
    """A probe without an answer for this long has failed."""
    failures: Annotated[int, Field(ge=1)] = 3
    """Failed probes in a row that end a generation."""
    check_interval_s: Seconds = 1.0
    """How often processes and token counters are looked at."""
    stall_s: Seconds = 15.0
    """Work waiting, no token and no CPU time for this long: the engine is stopped or stuck."""
    spin_s: Seconds = 600.0
    """Work waiting and no token for this long, although the engine uses its cores: it is wedged."""
    load_stall_s: Seconds = 120.0
    """Loading without progress and without CPU time for this long is a failure."""


class WorkerSettings(Section):
    """What holds for every worker."""

    drain_s: Seconds = 30.0
    """Requests in flight may take this long to finish when a worker is stopped."""
    stop_grace_s: Seconds = 5.0
    """Between SIGTERM and SIGKILL."""
    oversubscribe: bool = False
    """Let workers share cores when there are fewer than the models ask for."""
    zygote: bool = True
    """Keep a warm process to fork workers from; false: every worker is spawned."""
    known_answer_tolerance: Annotated[float, Field(allow_inf_nan=False, gt=0)] = 0.1
    """Largest mean difference of log-probabilities to the record, in nats. On the demo checkpoint bfloat16
    measures 0.04 to 0.05 against float32; any one of its 272 tensors zeroed gives 0.106 or more."""
    backoff: BackoffSettings = BackoffSettings()
    """What happens after a loss."""
    health: HealthSettings = HealthSettings()
    """When a worker counts as lost."""


class GatewaySettings(Section):
    """The HTTP side: addresses and bounds."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address every port is bound to: one of this host's, or its name."""
    allow_without_keys: bool = False
    """Take requests from beyond this host although nothing asks for a key: who reaches a port uses it."""
    router_port: Port = 8000
    """All models on one port."""
    metrics_port: Port = 9090
    """Prometheus metrics of everything."""
    health_port: Port = 8080
    """Health of the whole, on a port of its own."""
    cores: Annotated[int, Field(ge=0)] = 0
    """Cores kept free of engines for the daemon itself."""
    memory: Bytes = 2 * 1000**3
    """Memory set aside for the daemon itself, in bytes."""
    restart_wait_s: Annotated[float, Field(allow_inf_nan=False, ge=0)] = 60.0
    """A request waits this long for a worker that is coming up; 0: never."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Requests that wait for one worker at most."""
    replays: Annotated[int, Field(ge=0)] = 1
    """Times a request without output is given to a new generation after its engine died."""
    max_body: Bytes = 16 * 1024**2
    """Largest request body, in bytes."""
    keep_alive_s: Seconds = 75.0
    """A client's idle connection is closed after this long."""

    @property
    def loopback(self) -> bool:
        """Whether only this host can reach the ports."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class LogSettings(Section):
    """Where lines go and how many are kept."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least important lines that are written."""
    json_lines: bool = False
    """One JSON object a line on standard error instead of the readable form."""
    max_file: Bytes = 100 * 1000**2
    """A log file is rotated daily, and when it reaches this many bytes."""
    keep_days: Annotated[int, Field(ge=1)] = 30
    """Rotated files are deleted after this many days."""


class ControlSettings(Section):
    """The control socket."""

    group: str | None = None
    """Members of this group may use the socket, besides root and the daemon's own user."""


class Settings(Section):
    """The whole configuration."""

    banner: str = ""
    """A sentence shown at start-up, for instance that the models are stand-ins."""
    state_dir: LocalPath = Field(default_factory=default_state_dir)
    """What outlives the daemon: logs, known answers. Default: the unit's, for root `/var/lib/citadel`,
    else `~/.local/state/citadel-supervisor`."""
    runtime_dir: LocalPath | None = None
    """Sockets of the running daemon; made anew at each start. Default: the unit's, for root
    `/run/citadel`, else `$XDG_RUNTIME_DIR/citadel`, else in `state_dir`."""
    log_dir: LocalPath | None = None
    """The log files. Default: the unit's, for root `/var/log/citadel`, else in `state_dir`."""
    default_model: str | None = None
    """The model preferred for a request that names none, when loads are equal."""
    gateway: GatewaySettings = GatewaySettings()
    """The HTTP side."""
    workers: WorkerSettings = WorkerSettings()
    """Every worker."""
    log: LogSettings = LogSettings()
    """Logging."""
    control: ControlSettings = ControlSettings()
    """The control socket."""
    models: Annotated[dict[str, ModelSettings], Field(min_length=1)]
    """The models by id, in the order of preference."""

    @property
    def runtime(self) -> Path:
        """The directory of the running daemon's sockets."""
        return self.runtime_dir or default_runtime_dir(self.state_dir)

    @property
    def logs(self) -> Path:
        """The directory of the log files."""
        return self.log_dir or default_log_dir(self.state_dir)

    @property
    def socket(self) -> Path:
        """The control socket: `$CITADEL_SOCKET`, else in the runtime directory."""
        named = os.environ.get("CITADEL_SOCKET")
        return Path(named) if named else self.runtime / "control.sock"

    def ports(self) -> dict[str, int]:
        """Every port by the dotted path of its setting."""
        gateway = self.gateway
        return {
            "gateway.router_port": gateway.router_port,
            "gateway.metrics_port": gateway.metrics_port,
            "gateway.health_port": gateway.health_port,
            **{f"models.{name}.port": model.port for name, model in self.models.items()},
        }

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        refuse(conflicts(self))
        return self
