"""What a few requests leave in ``/metrics``."""

from collections.abc import Callable
from typing import Any

import pytest

import shoal

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]


async def test_requests_tokens_and_errors_are_counted(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        await h.complete(ignore_eos=True)
        await h.complete(model="poet", ignore_eos=True, n=2)
        await h.complete(model="nobody")
        response = await h.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = dict(
            line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
        )
    base = 'model_name="base"'
    assert lines[f"vllm:generation_tokens_total{{{base}}}"] == "24.0"
    assert lines[f"vllm:time_to_first_token_seconds_count{{{base}}}"] == "3.0"
    assert lines[f"vllm:inter_token_latency_seconds_count{{{base}}}"] == "21.0"
    assert lines[f"vllm:e2e_request_latency_seconds_count{{{base}}}"] == "3.0"
    assert lines[f'vllm:request_success_total{{finished_reason="length",{base}}}'] == "3.0"
    assert lines[f'shoal:adapter_requests_total{{adapter="poet",{base}}}'] == "2.0"
    assert lines[f'shoal:adapter_generation_tokens_total{{adapter="poet",{base}}}'] == "16.0"
    assert lines[f'shoal:adapter_uploads_total{{{base},outcome="accepted"}}'] == "1.0"
    assert lines[f'shoal:request_errors_total{{{base},status="404"}}'] == "1.0"
    assert lines[f"shoal:adapter_stage_seconds_count{{{base}}}"] == "1.0"


async def test_version(serve: Serve) -> None:
    async with serve() as h:
        response = await h.client.get("/version")
    assert response.json() == {"version": shoal.__version__}
