"""`check` on hosts and checkpoints of every kind: which problems it finds, and what it leaves alone."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.checkpoints.inspect import CheckpointInfo
from citadel_supervisor.conf.check import Problem, Report, examine
from citadel_supervisor.conf.host import Host, read_host
from citadel_supervisor.config import Settings
from citadel_supervisor.config_load import Loaded

HOST = Host(cpus=tuple(range(16)), memory=64 * 10**9, amx=True, engine=True)
MISTRAL = CheckpointInfo(
    Path("/opt/mistral"),
    architecture="MistralForCausalLM",
    dtype="bfloat16",
    weight_bytes=7_500_000_000,
    shards=2,
    max_context=32768,
    vocab_size=32000,
    hidden_size=4096,
    layers=32,
    kv_heads=8,
    head_dim=128,
    chat_template=True,
)


def report(
    host: Host = HOST, checkpoint: CheckpointInfo = MISTRAL, top: dict[str, Any] | None = None, **model: Any
) -> Report:
    """A check of one model, "a", that fits the host unless something is changed."""
    fits = {"port": 11400, "checkpoint": "/opt/mistral", "cores": 4, "memory": "15GB", "kv_cache": "4GiB"}
    return examine(_loaded({"models": {"a": fits | model}, **(top or {})}), host, lambda _: checkpoint)


def only(found: Report) -> Problem:
    [problem] = found.problems
    assert not found.ok
    assert problem.todo
    return problem


def test_a_model_that_fits_has_no_problem() -> None:
    found = report()
    assert found.ok
    assert found.models[0].cpus == (0, 1, 2, 3)
    assert found.notes == ()


def test_a_missing_checkpoint_says_where_it_is_expected_and_how_to_get_it() -> None:
    missing = CheckpointInfo(Path("/opt/none"), problems=("there is no such directory",))
    problem = only(report(checkpoint=missing))
    assert (problem.path, problem.what) == ("models.a.checkpoint", "/opt/none: there is no such directory")
    assert "make weights" not in problem.todo
    cached = examine(
        _loaded({"models": {"a": {"port": 1, "checkpoint": "cache:Demo"}}}), HOST, lambda _: missing
    )
    assert "make weights" in only(cached).todo


def test_a_budget_that_cannot_hold() -> None:
    problem = only(report(memory="12GB"))
    assert problem.path == "models.a.memory"
    assert problem.what == (
        "12 GB is too little by at least 0.7 GB: weights 7.5 GB, KV cache 4.3 GB, "
        "the rest of the worker 1.0 GB"
    )


def test_a_context_longer_than_the_checkpoint_knows() -> None:
    problem = only(report(checkpoint=replace(MISTRAL, max_context=4096), max_model_len=8192))
    assert (problem.path, problem.todo) == ("models.a.max_model_len", "set it to 4096 or less")


def test_a_cache_too_small_for_one_request() -> None:
    problem = only(report(kv_cache="1GiB", max_model_len=16384))
    assert problem.path == "models.a.kv_cache"
    assert "16384 tokens need 2048 MiB" in problem.what
    assert report(kv_cache="1GiB", max_model_len=8192).ok
    assert report(kv_cache="1GiB", max_model_len=16384, kv_cache_dtype="fp8").ok
    assert report(checkpoint=replace(MISTRAL, sliding_window=4096), kv_cache="1GiB", max_model_len=16384).ok


def test_a_quantised_mixture_of_experts_needs_amx() -> None:
    mixture = replace(MISTRAL, experts=8, quantisation="compressed-tensors W4A16")
    assert report(checkpoint=mixture).ok
    without = replace(HOST, amx=False)
    assert "AMX" in only(report(without, mixture)).what
    assert report(without, replace(mixture, quantisation="")).ok
    assert report(without, replace(mixture, experts=0)).ok


def test_too_few_cores() -> None:
    host = replace(HOST, cpus=(0, 1))
    problem = only(report(host))
    assert "this host has 2" in problem.what
    assert "oversubscribe" in problem.todo
    shared = report(host, top={"workers": {"oversubscribe": True}})
    assert shared.ok
    assert any("share cores" in note for note in shared.notes)


def test_a_host_without_the_engine() -> None:
    host = replace(HOST, engine=False)
    assert "vLLM is not installed" in only(report(host)).what
    assert report(host, python=__file__).ok, "that model runs in another environment"


def test_files_and_groups_that_do_not_exist() -> None:
    assert only(report(chat_template="/none.jinja")).path == "models.a.chat_template"
    assert only(report(top={"control": {"group": "no-such-group"}})).path == "control.group"
    assert report(top={"control": {"group": "root"}}).ok


def test_a_model_that_is_not_enabled_is_not_held_against_the_file() -> None:
    found = report(replace(HOST, engine=False), replace(MISTRAL, problems=("gone",)), enabled=False)
    assert found.ok
    assert found.notes == ("a is not enabled: it stays stopped until 'citadelctl start a'",)


@pytest.mark.parametrize(
    ("host", "checkpoint", "top", "note"),
    [
        (replace(HOST, memory=10 * 10**9), MISTRAL, {}, "add up to 17.0 GB and this host has 10.0 GB"),
        (HOST, replace(MISTRAL, chat_template=False), {}, "no chat template"),
        (HOST, MISTRAL, {"banner": "stand-ins"}, "stand-ins"),
        (
            HOST,
            MISTRAL,
            {"gateway": {"host": "0.0.0.0", "allow_without_keys": True}},
            "whoever reaches 0.0.0.0",
        ),
        (replace(HOST, running=True), MISTRAL, {}, "a supervisor is running"),
    ],
)
def test_what_is_worth_knowing_stops_nothing(
    host: Host, checkpoint: CheckpointInfo, top: dict[str, Any], note: str
) -> None:
    found = report(host, checkpoint, top)
    assert found.ok
    [said] = found.notes
    assert note in said


def test_a_port_that_is_held_is_a_problem_and_its_holder_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        host = read_host("127.0.0.1", [port], tmp_path / "none.sock")
        found = report(replace(HOST, refused=host.refused), port=port)
    problem = only(found)
    assert problem.path == "models.a.port"
    assert problem.what.startswith(f"port {port} on 127.0.0.1 is held by pid {os.getpid()} (")
    assert read_host("127.0.0.1", [port], tmp_path / "none.sock").refused == {}


def test_the_ports_of_a_running_supervisor_are_its_own(tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as supervisor:
        supervisor.bind(str(control))
        supervisor.listen()
        host = read_host("127.0.0.1", [server.getsockname()[1]], control)
    assert host.running
    assert host.refused == {}


@pytest.mark.parametrize("address", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_this_host_s(tmp_path: Path, address: str) -> None:
    host = read_host(address, [18000], tmp_path / "none.sock")
    assert (address, 18000) in host.refused


def test_this_host_can_be_read(tmp_path: Path) -> None:
    host = read_host("127.0.0.1", [0], tmp_path / "none.sock")
    assert host.cpus
    assert host.memory > 10**8
    assert not host.running
    assert host.refused == {}, "port 0 is any free one"


def _loaded(data: dict[str, Any]) -> Loaded:
    return Loaded(Settings.model_validate(data), Path("/etc/x.yaml"), ())
