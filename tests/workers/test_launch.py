"""What a worker is given and says: specs, reports, arguments and environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from citadel_supervisor.config import ModelSettings
from citadel_supervisor.workers.launch import (
    STATUS_LINE_MAX,
    Core,
    Fatal,
    Hello,
    LaunchSpec,
    Loading,
    Report,
    Serving,
    decode_report,
    encode_report,
    engine_argv,
    engine_environment,
)


@pytest.mark.parametrize(
    "report",
    [
        Hello(1),
        Core(2),
        Loading("weights", 10, 100),
        Loading("config"),
        Serving(),
        Fatal("why", permanent=True),
    ],
)
def test_reports_travel_as_one_line(report: Report) -> None:
    line = encode_report(report)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode_report(line) == report


@given(st.text(st.characters(exclude_categories=())) | st.text(min_size=1000, max_size=5000))
@example("\udc80 in a path")
@example("\x01" * 10_000)
@example("\U0001f600" * 2_000)
def test_no_message_makes_a_line_that_could_mix_with_another(message: str) -> None:
    line = encode_report(Fatal(message, permanent=False))
    assert len(line) <= STATUS_LINE_MAX + 1 <= 4096 and line.count(b"\n") == 1
    decoded = decode_report(line)
    assert isinstance(decoded, Fatal)
    assert message.encode("utf-8", "backslashreplace").decode().startswith(decoded.message)
    assert len(decoded.message) >= min(len(message), 500)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"garbage",
        b"[]",
        b'{"report": "other"}',
        b'{"report": "hello"}',
        b'{"report": "hello", "pid": "1"}',
        b'{"report": "loading", "phase": "dreaming"}',
        b'{"report": "fatal", "message": "\xff", "permanent": true}',
        b"\xff\xfe\x00",
        b"[" * 10_000,
    ],
)
def test_anything_else_is_one_kind_of_error(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_report(line)


def model(**settings: object) -> ModelSettings:
    return ModelSettings.model_validate({"port": 0, "checkpoint": "/models/tiny", **settings})


def test_the_engine_is_told_what_is_configured() -> None:
    argv = engine_argv(
        "phi", model(aliases=["small"], kv_cache="256MiB", max_model_len=512, kv_cache_dtype="fp8_e5m2")
    )
    text = " ".join(argv)
    assert argv[0] == "/models/tiny"
    assert " --served-model-name phi small auto --" in text
    assert "--kv-cache-memory-bytes=268435456" in argv and "--max-model-len=512" in argv
    assert "--kv-cache-dtype=fp8_e5m2" in argv and "--dtype=bfloat16" in argv
    assert "--enforce-eager" in argv and "--distributed-executor-backend=uni" in argv
    assert "--no-enable-log-requests" in argv and "--disable-uvicorn-access-log" in argv
    assert "--enforce-eager" not in engine_argv("phi", model(compile=True))
    assert not any("distributed" in one for one in engine_argv("phi", model(device="cuda")))


def test_tools_and_templates_are_passed_on_where_configured() -> None:
    plain = " ".join(engine_argv("m", model()))
    assert "tool" not in plain and "template" not in plain
    text = " ".join(engine_argv("m", model(tool_call_parser="hermes", chat_template="/a/b.jinja")))
    assert "--enable-auto-tool-choice" in text and "--tool-call-parser=hermes" in text
    assert "--chat-template=/a/b.jinja" in text


def test_own_engine_arguments_win_in_whatever_form_they_are_written() -> None:
    own = {
        "max_model_len": 99,
        "--seed": 7,
        "enable_chunked_prefill": False,
        "enforce-eager": None,
        "override-generation-config": {"temperature": 0.5},
        "allowed-origins": ["a", "b"],
    }
    argv = engine_argv("m", model(engine_args=own))
    text = " ".join(argv)
    assert "--max-model-len=99" in argv and text.count("--max-model-len") == 1
    assert "--seed=7" in argv
    assert "--no-enable-chunked-prefill" in argv and "--enable-chunked-prefill" not in argv
    assert "--enforce-eager" not in text, "null takes an argument away"
    (config,) = [one for one in argv if one.startswith("--override-generation-config=")]
    assert json.loads(config.partition("=")[2]) == {"temperature": 0.5}
    assert "--allowed-origins a b" in text


def environment(base: dict[str, str], threads: int | None = 2, preload: str = "") -> dict[str, str]:
    return engine_environment(base, threads=threads, cache=Path("/c"), scratch=Path("/s"), preload=preload)


def test_engines_get_no_settings_or_secrets_of_the_daemon() -> None:
    given_to_daemon = {
        "PATH": "/bin",
        "HOME": "/root",
        "VLLM_API_KEY": "secret",
        "CITADEL_GATEWAY__ROUTER_PORT": "1",
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "1",
        "LISTEN_FDS": "3",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "64",
    }
    made = environment(given_to_daemon)
    assert made["PATH"] == "/bin" and made["HOME"] == "/root"
    assert not set(made) & {"VLLM_API_KEY", "CITADEL_GATEWAY__ROUTER_PORT", "NOTIFY_SOCKET", "LISTEN_FDS"}
    assert not any(name.startswith(("WATCHDOG", "LISTEN")) for name in made)
    assert made["CUDA_VISIBLE_DEVICES"] == "" and made["OMP_NUM_THREADS"] == "2"
    assert given_to_daemon["VLLM_API_KEY"] == "secret", "the daemon's own is untouched"


def test_temporary_files_and_caches_have_their_places() -> None:
    made = environment({"TMPDIR": "/tmp", "VLLM_CACHE_ROOT": "/elsewhere"})
    assert made["TMPDIR"] == made["VLLM_RPC_BASE_PATH"] == "/s"
    assert made["VLLM_CACHE_ROOT"] == "/c/vllm"
    assert made["HF_HUB_OFFLINE"] == made["VLLM_NO_USAGE_STATS"] == "1", "nothing is fetched or sent"


def test_the_zygote_has_no_number_of_threads_and_preloads_what_is_there() -> None:
    assert "OMP_NUM_THREADS" not in environment({}, threads=None)
    assert "LD_PRELOAD" not in environment({})
    assert environment({}, preload="/a.so:/b.so")["LD_PRELOAD"] == "/a.so:/b.so"


def test_processes_have_telling_names() -> None:
    spec = LaunchSpec(
        model="phi", generation=3, socket="", scratch="", cache="", cpus=(), threads=1, argv=(),
        device="cpu", supervisor_pid=os.getpid(), stop_grace_s=1,
    )  # fmt: skip
    assert spec.title("engine core") == "citadel: phi engine core (generation 3)"
    assert msgspec.json.decode(msgspec.json.encode(spec), type=LaunchSpec) == spec
