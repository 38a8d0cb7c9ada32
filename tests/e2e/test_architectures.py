"""Every architecture of the production profile on the real engine, and checkpoints that must not serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import httpx
import openai
import pytest

from citadel_supervisor.checkpoints.known_answer import KnownAnswer
from citadel_supervisor.checkpoints.tiny import Arch, make_tiny
from tests.e2e.checkpoints import perturbed, truncated
from tests.e2e.daemon import DEMO_CHECKPOINT, Daemon, Status, demo_model, write_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ARCHITECTURES: tuple[str, ...] = get_args(Arch)
GOOD = (*ARCHITECTURES, "spawned")


@pytest.fixture(scope="module")
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """The four tiny architectures, one of them also spawned, and two checkpoints that are not right."""

    def write(place: Path) -> Path:
        tiny = {arch: make_tiny(arch, place / arch) for arch in get_args(Arch)}
        common = {"dtype": "float32", "kv_cache": "32MiB", "max_model_len": 512}
        models = {arch: common | {"checkpoint": str(path)} for arch, path in tiny.items()}
        models["spawned"] = common | {"checkpoint": str(tiny["llama"]), "launch": "spawn"}
        models["damaged"] = common | {"checkpoint": str(truncated(tiny["mistral"], place / "damaged"))}
        wrong = perturbed(DEMO_CHECKPOINT, place / "wrong", "model.layers.14.mlp.down_proj.weight")
        models["wrong"] = demo_model(checkpoint=str(wrong))
        return write_config(place, models)

    return make_daemon(write)


@pytest.fixture
async def status(daemon: Daemon) -> Status:
    """Once each model is ready or quarantined."""
    if not daemon.running():
        daemon.start()
    return await daemon.settled()


@pytest.mark.parametrize("model", GOOD)
async def test_it_loads_and_answers(status: Status, model: str) -> None:
    seen = status["models"][model]
    assert seen["state"] == "ready", seen["reason"]
    assert seen["launch"] == ("spawn" if model == "spawned" else "zygote")
    url = f"http://127.0.0.1:{seen['port']}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        chat = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "The quick brown fox"}],
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 8
        answers = [
            await client.completions.create(
                model=model, prompt="The quick", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
            )
            for _ in range(2)
        ]
    assert answers[0].choices[0].text == answers[1].choices[0].text != ""


async def test_what_they_answer_is_kept_and_held_against_the_next_generation(
    daemon: Daemon, status: Status
) -> None:
    first = {model: status["models"][model] for model in GOOD}
    records = list((daemon.place / "state" / "known_answers").iterdir())
    assert len(records) == len(ARCHITECTURES), "the spawned one has the same checkpoint as another"
    assert all(len(KnownAnswer.load(record).logprobs) > 10 for record in records)
    assert (await daemon.ctl("restart", "--no-wait", *GOOD)).code == 0
    again = await daemon.until(
        lambda seen: all(
            seen["models"][model]["state"] == "ready"
            and seen["models"][model]["generation"] == first[model]["generation"] + 1
            for model in GOOD
        )
    )
    for model in GOOD:
        assert again["models"][model]["reason"].startswith(
            "log-probabilities within 0.000 nats of the record"
        )


async def test_a_damaged_checkpoint_is_quarantined_with_the_reason(daemon: Daemon, status: Status) -> None:
    seen = status["models"]["damaged"]
    assert seen["state"] == "quarantined"
    assert seen["generation"] == 1, "not tried again: no restart would help"
    assert "safetensor" in seen["reason"].lower()
    assert any(word in seen["reason"].lower() for word in ("truncated", "incomplete", "cut off", "damaged"))
    await _refuses(daemon, seen)


async def test_wrong_weights_never_serve(daemon: Daemon, status: Status) -> None:
    """They load and run, but do not compute what the checkpoint's record says."""
    seen = status["models"]["wrong"]
    assert seen["state"] == "quarantined"
    assert seen["generation"] == 1
    assert seen["reason"].startswith("wrong known answer: log-probabilities differ by ")
    moves = [
        (event["before"], event["after"])
        for event in await daemon.events()
        if event["kind"] == "transition" and event["model"] == "wrong"
    ]
    assert ("verifying", "failed") in moves
    assert "ready" not in {after for _, after in moves}
    await _refuses(daemon, seen)


async def _refuses(daemon: Daemon, seen: Status) -> None:
    """It says why on its port and in the table, nothing of it runs, and the router goes round it."""
    async with httpx.AsyncClient(timeout=60) as http:
        url = f"http://127.0.0.1:{seen['port']}"
        answer = await http.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert seen["reason"] in answer.json()["error"]["message"]
        health = await http.get(f"{url}/health")
        assert (health.status_code, health.json()["reason"]) == (503, seen["reason"])
    assert seen["pid"] is None
    assert not any(f"citadel: {seen['id']} " in process for process in daemon.names().values())
    await daemon.until(lambda _: daemon.zombies() == [], 10)
    shown = (await daemon.ctl("status", seen["id"])).out
    assert "quarantined" in shown
    assert seen["reason"][:30] in shown
    assert daemon.running()
