"""A fleet's adapters are served by a running server as soon as each is finished."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.e2e.test_architectures import settings

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.config import FleetConfig
from shoal.adapters.training.fleet.loop import FleetStepMetrics
from shoal.adapters.training.fleet.publishing import RegistryPublisher
from shoal.adapters.training.fleet.trainer import train_fleet
from shoal.server.assemble import assemble
from shoal.server.http.app import create_app


@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_a_finished_adapter_is_served_while_others_are_still_trained(
    tiny: Any, tmp_path: Path, method: str
) -> None:
    prompt, completion = "a b c ", "d e f"
    record = json.dumps({"prompt": prompt, "completion": completion}) + "\n"
    (tmp_path / "data.jsonl").write_text(record)
    tenants = [
        {"name": "short", "steps": 5, "tags": {"team": "blue"}},
        {"name": "long", "steps": 20},
    ]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({**t, "data": "data.jsonl"}) + "\n" for t in tenants))
    config = settings(tiny, tmp_path)
    common = TrainConfig(
        method=method,  # type: ignore[arg-type]
        base=tiny.path,
        data=tasks,
        out=tmp_path / "out",
        rank=8,
        basis_rank=16 if method == "lora-xs" else None,
        lr=0.05,
        warmup=0.0,
        device="cpu",
    )
    opened: list[RegistryPublisher] = []
    answers: list[tuple[list[tuple[str, dict[str, str]]], str]] = []

    def publisher(source: Any) -> RegistryPublisher:
        assert config.registry is not None
        opened.append(RegistryPublisher(source, config.registry, None))
        return opened[-1]

    with assemble(config) as services, TestClient(create_app(services)) as client:

        def text(model: str) -> str:
            body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        def look(done: FleetStepMetrics) -> None:
            if done.step != 12:
                return
            end = time.monotonic() + 120  # it is published beside the training
            listed: list[dict[str, Any]] = []
            while not any(adapter["tags"] for adapter in listed):  # they come just after the name
                assert time.monotonic() < end
                time.sleep(0.05)
                listed = client.get("/v1/adapters").json()["data"]
            answers.append(([(a["name"], a["tags"]) for a in listed], text("short")))

        assert client.get("/v1/adapters").json()["data"] == []
        result = train_fleet(
            FleetConfig(common=common, fleet=tasks, rows=8),
            cache_dir=tmp_path / "bases",
            progress=False,
            on_step=look,
            publisher=publisher,
        )
        opened[0].close()
        assert [end.published for end in result.tenants] == ["short@1", "long@1"]
        assert answers == [([("short", {"team": "blue"})], text("short"))]
        # Memorised: what is served is what was trained.
        assert text("long") == completion
        assert text(config.base_name) != completion
