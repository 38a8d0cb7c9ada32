"""The configuration as an operator meets it: what is accepted, and what is said about what is not."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import ValidationError

from citadel_supervisor.conf.reference import json_schema, settings_table, with_table
from citadel_supervisor.conf.types import format_bytes
from citadel_supervisor.config import ModelSettings, control_socket, parse_bytes
from citadel_supervisor.config_load import load, load_settings
from citadel_supervisor.errors import ConfigError

ROOT = Path(__file__).parents[1]
MODEL = "models: {phi-3-mini: {port: 11403, checkpoint: /opt/phi}}"


def _write(directory: Path, text: str) -> Path:
    file = directory / "citadel.yaml"
    file.write_text(dedent(text), encoding="utf-8")
    return file


def problems(directory: Path, text: str, env: dict[str, str] | None = None) -> list[str]:
    """What is said about `text`, which must be refused."""
    with pytest.raises(ConfigError) as refused:
        load_settings(_write(directory, text), env or {})
    assert refused.value.source == str(directory / "citadel.yaml")
    return refused.value.problems


def test_the_least_that_must_be_said(tmp_path: Path) -> None:
    settings = load_settings(_write(tmp_path, MODEL), {})
    assert settings.models["phi-3-mini"].port == 11403
    assert settings.gateway.host == "127.0.0.1"
    assert settings.gateway.router_port == 8000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "models: {phi-3-mini: {port: 1, checkpoint: /x, max_model_length: 3}}",
            "models.phi-3-mini.max_model_length: unknown key; did you mean 'max_model_len'?",
        ),
        (f"bannr: hello\n{MODEL}", "bannr: unknown key; did you mean 'banner'?"),
        (f"router_port: 9\n{MODEL}", "router_port: unknown key; did you mean 'gateway.router_port'?"),
        (f"kv_cache: 1GB\n{MODEL}", "kv_cache: unknown key; did you mean 'models.<id>.kv_cache'?"),
        (f"control: {{zzz: 1}}\n{MODEL}", "control.zzz: unknown key; allowed here: group"),
        (
            f"workers: {{health: {{stall: 3}}}}\n{MODEL}",
            "workers.health.stall: unknown key; did you mean 'stall_s'?",
        ),
        (
            "models: {a: {checkpoint: /x}}",
            "models.a.port: required: the model's own port; 0 takes any free one",
        ),
        ("banner: hello", "models: required: the models by id, in the order of preference"),
        ("models: {}", "models: must not be empty"),
        ("models: {a: 3}", "models.a: must be a mapping ('key: value' lines below it), not 3"),
        (f"log:\n{MODEL}", "log: must be a mapping ('key: value' lines below it), not empty"),
        (f"gateway: {{cores: two}}\n{MODEL}", "gateway.cores: must be a whole number, not 'two'"),
        (f"gateway: {{cores: 1.5}}\n{MODEL}", "gateway.cores: must be a whole number, not 1.5"),
        (f"gateway: {{cores: yes}}\n{MODEL}", "gateway.cores: must be a number, not true"),
        (
            f"gateway: {{router_port: 65536}}\n{MODEL}",
            "gateway.router_port: must be at most 65535, not 65536",
        ),
        (f"workers: {{drain_s: 0}}\n{MODEL}", "workers.drain_s: must be more than 0, not 0"),
        (f"workers: {{drain_s: .inf}}\n{MODEL}", "workers.drain_s: must be a finite number, not inf"),
        (f"workers: {{drain_s: soon}}\n{MODEL}", "workers.drain_s: must be a number, not 'soon'"),
        (f"workers: {{zygote: maybe}}\n{MODEL}", "workers.zygote: must be true or false, not 'maybe'"),
        (
            f"log: {{level: loud}}\n{MODEL}",
            "log.level: must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR', not 'loud'",
        ),
        (
            f"gateway: {{max_body: 16 MX}}\n{MODEL}",
            "gateway.max_body: not a size: '16 MX'; write for instance 512MB, 4GiB or a number of bytes",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, aliases: b}}",
            "models.a.aliases: must be a list, for instance [one, two], not 'b'",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, aliases: ['b c']}}",
            "models.a.aliases.0: must start with a letter or digit and hold only letters, digits and "
            ". _ : / @ + -, not 'b c'",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, description: 3}}",
            "models.a.description: must be text, not 3, so write it in quotes",
        ),
        (
            "models: {a: {port: 1, checkpoint: 'cache:../etc'}}",
            "models.a.checkpoint: 'cache:../etc' names no cached checkpoint; "
            "write for instance cache:SmolLM2-135M-Instruct",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, launch: zygote, device: cuda}}",
            "models.a.launch: 'zygote' serves neither device 'cuda' "
            "nor its own 'python' or 'env'; use 'auto'",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, max_num_seqs: 4096}}",
            "models.a.max_num_batched_tokens: 2048 is less than max_num_seqs, 4096; "
            "each running sequence takes a token a step",
        ),
        (
            "models: {a: {port: 8000, checkpoint: /x}}",
            "models.a.port: 8000 is gateway.router_port as well; give each a port of its own",
        ),
        (
            "models: {Phi 3: {port: 1, checkpoint: /x}}",
            "models.Phi 3: an id is at most 63 lower-case letters, digits, '.', '_' and '-', "
            "a letter or digit first",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x}, b: {port: 2, checkpoint: /x, aliases: [a]}}",
            "models.b: the name 'a' is taken by models.a",
        ),
        (
            "models: {a: {port: 1, checkpoint: /x, aliases: [auto]}}",
            "models.a: the name 'auto' is taken by the router's own word",
        ),
        (
            "models: {zygote: {port: 1, checkpoint: /x}}",
            "models.zygote: the name 'zygote' is taken by the zygote's log",
        ),
        (f"default_model: gpt\n{MODEL}", "default_model: 'gpt' is not one of phi-3-mini"),
        (
            f"gateway: {{host: 0.0.0.0}}\n{MODEL}",
            "gateway.host: 0.0.0.0 can be reached from other hosts and nothing asks for a key; "
            "use 127.0.0.1, or say that you want this with gateway.allow_without_keys: true",
        ),
        ("", "the file is empty; it must at least name one model under 'models:'"),
        ("- a\n- b", "must be a mapping of settings ('key: value' lines), not a list"),
        ("hello", "must be a mapping of settings ('key: value' lines), not a single value"),
        (f"banner: a\nbanner: b\n{MODEL}", "line 2: the key 'banner' is there already, in line 1"),
        (
            "models:\n  12: {port: 1, checkpoint: /x}",
            "line 2: the key '12' is not text; write it in quotes",
        ),
    ],
)
def test_a_mistake_is_named_with_its_path_and_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    assert problems(tmp_path, text) == [said]


def test_a_syntax_error_is_placed(tmp_path: Path) -> None:
    [said] = problems(tmp_path, "gateway:\n  host: 'open\n")
    assert said.startswith("line 3, column 1: not valid YAML: ")
    [said] = problems(tmp_path, "models: {a: {port: 1}")
    assert said.startswith("line 1, column 22: not valid YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [*x]",
        "a: !!python/object:os.system {}",
        "a: *nothing",
        "a: \x07",
        "a: 2026-13-01",
        "[" * 5000,
        '"a\\nb": 1',
        "? [a, b]\n: c",
    ],
)
def test_hostile_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    for said in problems(tmp_path, text):
        assert "\n" not in said
        assert len(said) < 300


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = problems(
        tmp_path,
        """
        banner: a
        banner: b
        gateway: {router_port: 70000, host: 0.0.0.0, cores: on}
        default_model: nope
        models:
          a: {port: 11400, memory: lots}
          b: {port: 11400, checkpoint: /x, launch: zygote, env: {A: "1"}}
        """,
        {"CITADEL_LOG__LEVEL": "loud", "CITADEL_NONSENSE": "1"},
    )
    assert {line.partition(": ")[0] for line in said} == {
        "line 3",
        "gateway.router_port",
        "gateway.host",
        "gateway.cores",
        "default_model",
        "models.a.checkpoint",
        "models.a.memory",
        "models.b.launch",
        "models.b.port",
        "log.level (from CITADEL_LOG__LEVEL)",
        "CITADEL_NONSENSE",
    }
    assert len(said) == len(set(said)) == 11


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no such file; name one with --config or CITADEL_CONFIG"):
        load_settings(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        load_settings(tmp_path, {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 3\)"):
        load_settings(binary, {})


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = _write(tmp_path, MODEL)
    assert load(None, {"CITADEL_CONFIG": str(file)}).path == file
    with pytest.raises(ConfigError, match=r"^/nowhere/x\.yaml: "):
        load(None, {"CITADEL_CONFIG": "/nowhere/x.yaml"})


TWO = """
models:
  phi-3-mini: {port: 11403, checkpoint: /x, engine_args: {seed: 7, foo: bar}}
  openchat-3.5: {port: 11402, checkpoint: /x}
"""


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    env = {
        "CITADEL_GATEWAY__ROUTER_PORT": "9000",
        "CITADEL_WORKERS__HEALTH__STALL_S": "7.5",
        "CITADEL_WORKERS__OVERSUBSCRIBE": "true",
        "CITADEL_BANNER": "hello",
        "CITADEL_CONTROL__GROUP": "null",
        "CITADEL_MODELS__PHI_3_MINI__CORES": "2",
        "CITADEL_MODELS__OPENCHAT_3_5__MEMORY": "8GB",
        "CITADEL_MODELS__OPENCHAT_3_5__ALIASES": '["chat", "oc"]',
        "CITADEL_MODELS__OPENCHAT_3_5__OBJECTIVES__LATENCY_AVG_S": "1",
        "CITADEL_MODELS__PHI_3_MINI__ENGINE_ARGS": '{"seed": 8}',
        "CITADEL_LOG": '{"level": "DEBUG", "keep_days": 3}',
        "CITADEL_LOG__KEEP_DAYS": "4",
        "CITADEL_SOCKET": "/x",
        "CITADEL_CACHE_DIR": "/x",
        "CITADEL_TEST_ANYTHING": "x",
        "PATH": "/bin",
    }
    loaded = load(_write(tmp_path, TWO), env)
    settings = loaded.settings
    assert settings.gateway.router_port == 9000
    assert settings.workers.health.stall_s == 7.5
    assert settings.workers.oversubscribe is True
    assert settings.banner == "hello"
    assert settings.control.group is None
    assert (settings.log.level, settings.log.keep_days) == ("DEBUG", 4)
    phi, chat = settings.models["phi-3-mini"], settings.models["openchat-3.5"]
    assert phi.cores == 2
    assert phi.port == 11403
    assert phi.engine_args == {"seed": 8, "foo": "bar"}
    assert (chat.memory, chat.aliases, chat.objectives.latency_avg_s) == (8 * 10**9, ("chat", "oc"), 1.0)
    assert list(settings.models) == ["phi-3-mini", "openchat-3.5"]
    assert {override.variable for override in loaded.overrides} == {
        name
        for name in env
        if name not in ("CITADEL_SOCKET", "CITADEL_CACHE_DIR", "CITADEL_TEST_ANYTHING", "PATH")
    }


def test_any_number_of_ports_may_be_any_free_one(tmp_path: Path) -> None:
    text = "models: {a: {port: 0, checkpoint: /x}, b: {port: 0, checkpoint: /x}}"
    env = {f"CITADEL_GATEWAY__{name}_PORT": "0" for name in ("ROUTER", "METRICS", "HEALTH")}
    assert set(load_settings(_write(tmp_path, text), env).ports().values()) == {0}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "CITADEL_GATEWAY__ROUTER_PROT",
            "1",
            "CITADEL_GATEWAY__ROUTER_PROT: unknown variable; did you mean CITADEL_GATEWAY__ROUTER_PORT?",
        ),
        (
            "CITADEL_ROUTER_PORT",
            "1",
            "CITADEL_ROUTER_PORT: unknown variable; did you mean CITADEL_GATEWAY__ROUTER_PORT?",
        ),
        (
            "CITADEL_MODELS__PHI_3__CORES",
            "1",
            "CITADEL_MODELS__PHI_3__CORES: unknown variable; did you mean CITADEL_MODELS__PHI_3_MINI__CORES?",
        ),
        (
            "CITADEL_QQQ",
            "1",
            "CITADEL_QQQ: unknown variable; each must name a setting: CITADEL_SECTION__KEY",
        ),
        (
            "CITADEL_MODELS__PHI_3_MINI__ENV__HF_HOME",
            "x",
            "CITADEL_MODELS__PHI_3_MINI__ENV__HF_HOME: unknown; "
            "set CITADEL_MODELS__PHI_3_MINI__ENV to a JSON object instead",
        ),
        (
            "CITADEL_MODELS__PHI_3_MINI__ALIASES",
            "chat",
            "CITADEL_MODELS__PHI_3_MINI__ALIASES: not valid JSON, which models.phi-3-mini.aliases takes",
        ),
        (
            "CITADEL_GATEWAY__ROUTER_PORT",
            "http",
            "gateway.router_port (from CITADEL_GATEWAY__ROUTER_PORT): must be a whole number, not 'http'",
        ),
        (
            "CITADEL_LOG",
            '{"levle": "INFO"}',
            "log.levle (from CITADEL_LOG): unknown key; did you mean 'level'?",
        ),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, name: str, value: str, said: str) -> None:
    assert problems(tmp_path, TWO, {name: value}) == [said]


def test_a_variable_that_means_two_models_is_refused(tmp_path: Path) -> None:
    text = "models: {a-b: {port: 1, checkpoint: /x}, a.b: {port: 2, checkpoint: /x}}"
    assert problems(tmp_path, text, {"CITADEL_MODELS__A_B__CORES": "2"}) == [
        "CITADEL_MODELS__A_B__CORES: means models.a-b.cores and models.a.b.cores; set it in the file"
    ]


def test_an_engines_environment_is_not_shown(tmp_path: Path) -> None:
    text = "models: {a: {port: 1, checkpoint: /x, env: {TOKEN: 12345}}}"
    assert problems(tmp_path, text) == ["models.a.env.TOKEN: must be text"]


def test_relative_paths_are_taken_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("CITADEL_CACHE_DIR", "/cache")
    text = """
        state_dir: ~/state
        models:
          a: {port: 1, checkpoint: weights/a, chat_template: a.jinja}
          b: {port: 2, checkpoint: "cache:B"}
    """
    settings = load_settings(_write(tmp_path, text), {})
    assert settings.state_dir == Path("/home/ada/state")
    assert settings.models["a"].checkpoint_path == tmp_path / "weights/a"
    assert settings.models["a"].chat_template == tmp_path / "a.jinja"
    assert settings.models["b"].checkpoint_path == Path("/cache/checkpoints/B")


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = load_settings(_write(tmp_path, MODEL), {})
    for section, name in (
        (settings, "banner"),
        (settings.gateway, "host"),
        (settings.models["phi-3-mini"], "port"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, "x")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("90GB", 90 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("4gib", 4 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("4096", 4096),
        ("1 kB", 1000),
        (" 2TB ", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 GBit", "4G", "1,5 GB", "1e9", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)
    with pytest.raises(ValidationError):
        ModelSettings(port=1, checkpoint="/x", memory=text)


@pytest.mark.parametrize("size", [1, 1000, 128 * 2**20, 2**30, 90 * 10**9, 2500 * 10**6, 3 * 2**40])
def test_sizes_are_written_so_that_they_can_be_read(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("box", False),
    ],
)
def test_which_addresses_only_this_host_can_reach(tmp_path: Path, host: str, loopback: bool) -> None:
    allowed = f"gateway: {{host: '{host}', allow_without_keys: true}}\n{MODEL}"
    assert load_settings(_write(tmp_path, allowed), {}).gateway.loopback is loopback


def test_the_unit_s_directories_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CITADEL_SOCKET", raising=False)
    monkeypatch.setenv("STATE_DIRECTORY", "/s/one:/s/two")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/r/citadel")
    monkeypatch.setenv("LOGS_DIRECTORY", "/l/citadel")
    settings = load_settings(_write(tmp_path, MODEL), {})
    assert (settings.state_dir, settings.runtime, settings.logs) == (
        Path("/s/one"),
        Path("/r/citadel"),
        Path("/l/citadel"),
    )
    assert settings.socket == Path("/r/citadel/control.sock")
    chosen = f"state_dir: /a\nruntime_dir: /b\nlog_dir: /c\n{MODEL}"
    settings = load_settings(_write(tmp_path, chosen), {})
    assert (settings.state_dir, settings.runtime, settings.logs) == (Path("/a"), Path("/b"), Path("/c"))


@pytest.fixture
def as_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not root, outside any unit; the user's runtime directory is returned."""
    for name in ("CITADEL_SOCKET", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "LOGS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return tmp_path / "run"


def test_citadelctl_finds_one_s_own_daemon_before_the_system_s(
    as_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, system = as_user / "citadel/control.sock", tmp_path / "system"
    system.mkdir()
    assert control_socket(system=system) == own, "neither is there"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(system / "control.sock"))
    assert control_socket(system=system) == system / "control.sock"
    own.parent.mkdir(parents=True)
    own.touch()
    assert control_socket(system=system) == own
    monkeypatch.setenv("CITADEL_SOCKET", "/named/by/env")
    assert control_socket(system=system) == Path("/named/by/env")
    assert control_socket("/named", system=system) == Path("/named")


def test_a_system_socket_that_one_may_not_see_is_still_the_one_to_try(
    as_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system"

    def denied(path: Path) -> object:
        if path.is_relative_to(system):
            raise PermissionError(13, "Permission denied")
        raise FileNotFoundError

    monkeypatch.setattr(Path, "stat", denied)
    assert control_socket(system=system) == system / "control.sock"


def test_defaults_without_root(as_user: Path, tmp_path: Path) -> None:
    settings = load_settings(_write(tmp_path, MODEL), {})
    assert settings.state_dir == tmp_path / "state/citadel-supervisor"
    assert settings.logs == settings.state_dir / "logs"
    assert settings.socket == as_user / "citadel/control.sock"


# The shipped files.

PORTS = {"mixtral-8x7b": 11400, "hermes-2": 11401, "openchat-3.5": 11402, "phi-3-mini": 11403}


@pytest.mark.parametrize("name", ["citadel.yaml", "demo.yaml"])
def test_a_shipped_profile_loads(name: str) -> None:
    settings = load_settings(ROOT / "etc" / name, {})
    assert {model_id: model.port for model_id, model in settings.models.items()} == PORTS
    gateway = settings.gateway
    assert (gateway.router_port, gateway.metrics_port, gateway.health_port) == (8000, 9090, 8080)
    assert gateway.loopback
    first = (ROOT / "etc" / name).read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=citadel.schema.json"


def test_the_demo_says_what_it_is() -> None:
    settings = load_settings(ROOT / "etc/demo.yaml", {})
    assert "SmolLM2-135M-Instruct" in settings.banner
    for model in settings.models.values():
        assert model.checkpoint == "cache:SmolLM2-135M-Instruct"
        assert "SmolLM2-135M-Instruct" in model.description


def test_the_production_profile_asks_for_what_is_specified() -> None:
    settings = load_settings(ROOT / "etc/citadel.yaml", {})
    rows = {
        name: (
            m.memory // 10**9,
            m.cores,
            m.max_model_len,
            m.max_num_batched_tokens,
            m.max_num_seqs,
            m.concurrency,
            m.objectives.latency_avg_s,
            m.objectives.latency_p95_s,
            m.objectives.requests_per_minute,
        )
        for name, m in settings.models.items()
    }
    assert rows == {
        "mixtral-8x7b": (90, 8, 32768, 8192, 256, 8, 2.0, 3.0, 50),
        "hermes-2": (15, 4, 8192, 4096, 128, 12, 1.5, 2.5, 80),
        "openchat-3.5": (8, 4, 8192, 2048, 64, 16, 1.0, 1.5, 120),
        "phi-3-mini": (4, 2, 2048, 1024, 32, 20, 0.5, 0.75, 200),
    }
    assert (settings.gateway.cores, settings.gateway.memory) == (4, 2 * 10**9)
    assert settings.models["phi-3-mini"].kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("name", "weights_gib", "vocabulary", "hidden", "kv_bytes_per_token"),
    [
        ("mixtral-8x7b", 22.8, 32000, 4096, 128 * 1024),
        ("hermes-2", 7.0, 32032, 4096, 128 * 1024),
        ("openchat-3.5", 3.8, 32002, 4096, 128 * 1024),
        ("phi-3-mini", 2.1, 32064, 3072, 192 * 1024),
    ],
)
def test_the_production_budgets_hold(
    name: str, weights_gib: float, vocabulary: int, hidden: int, kv_bytes_per_token: int
) -> None:
    """Weights, cache, embeddings' copies, the two processes' own, and buffers that grow with the batch."""
    model = load_settings(ROOT / "etc/citadel.yaml", {}).models[name]
    own = (140 + 270) * 2**20
    buffers = 150 * 2**20 * model.max_num_batched_tokens / 2048
    needed = weights_gib * 2**30 + model.kv_cache + 2 * vocabulary * hidden * 2 + own + buffers
    assert needed < model.memory
    assert model.kv_cache >= kv_bytes_per_token * model.max_model_len


def test_the_checked_in_schema_is_current() -> None:
    checked_in = (ROOT / "etc/citadel.schema.json").read_text(encoding="utf-8")
    assert checked_in == json_schema(), "stale: run scripts/write-reference"


def test_the_schema_says_what_the_loader_does() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    yaml = pytest.importorskip("yaml")
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    for name in ("citadel.yaml", "demo.yaml"):
        data = yaml.safe_load((ROOT / "etc" / name).read_text(encoding="utf-8"))
        assert list(validator.iter_errors(data)) == []
    wrong = {
        "gateway": {"router_port": 70000},
        "models": {"a": {"port": 1, "checkpoint": "/x", "memory": "4 XB"}},
    }
    places = {".".join(map(str, error.absolute_path)) for error in validator.iter_errors(wrong)}
    assert places == {"gateway.router_port", "models.a.memory"}


def test_the_guide_has_every_setting() -> None:
    guide = (ROOT / "docs/configure.md").read_text(encoding="utf-8")
    assert with_table(guide, settings_table()) == guide, "stale: run scripts/write-reference"
    assert "| `max_model_len` | whole number from 16 | 2048 | Longest context, in tokens. |" in guide


def test_every_setting_is_explained() -> None:
    undocumented = [
        line for line in settings_table().splitlines() if line.startswith("| `") and line.endswith("|  |")
    ]
    assert undocumented == []
