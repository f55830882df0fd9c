"""Real worker processes before a fake engine: they answer, die, come again, and end in order."""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.server.workers import processes, serving
from shoal.server.workers.processes import Workers, started
from shoal.server.workers.serving import serve_apart

# A process takes seconds to import what it needs, on a busy machine many.
PATIENCE_S = 90.0
ROOT = Path(__file__).parents[3]
BODY = {"model": "base", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}

Build = Callable[..., Any]


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False  # that socket's worker is not there yet


def visit(workers: Workers, parts: Any) -> None:
    """What its clients see of a server with two workers."""
    url = workers.url
    # Both answer, with what the engine's process knows.
    for _ in range(8):
        assert httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == "base"
    whole = httpx.post(f"{url}/v1/completions", json=BODY | {"stream": False}, timeout=30)
    assert whole.json()["usage"]["completion_tokens"] == 200
    refused = httpx.post(f"{url}/v1/completions", json=BODY | {"model": "nobody"}, timeout=30)
    assert refused.status_code == 404
    files = [
        ("file", (name, b"{}")) for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    made = httpx.post(f"{url}/v1/adapters", data={"name": "one"}, files=files, timeout=30)
    assert made.status_code == 201, made.text
    used = httpx.post(
        f"{url}/v1/completions", json=BODY | {"model": "one", "stream": False}, timeout=30
    )
    assert used.headers["x-shoal-adapter"] == "one@1"
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    assert re.search(r'^vllm:request_success_total\{.*"length".*\} 2\.0$', metrics, re.M)
    assert re.search(r'^shoal:request_errors_total\{.*status="404"\} 1\.0$', metrics, re.M)

    # One is killed while each has a stream: its clients' connections end, the other's go on.
    parts.gate.delay_s = 0.005
    before = workers.pids
    assert len(before) == 2
    ends: list[str] = []

    def follow() -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30) as stream:
                ends.append([line for line in stream.iter_lines() if line][-1])
        except httpx.TransportError:
            ends.append("cut")

    followers = [threading.Thread(target=follow) for _ in range(12)]
    for follower in followers:
        follower.start()
    until(lambda: parts.services.engine.stats().running == 12)
    os.kill(before[0], signal.SIGKILL)
    for follower in followers:
        follower.join(PATIENCE_S)
    assert set(ends) <= {"cut", "data: [DONE]"}
    assert len(ends) == 12
    assert parts.services.engine.stats().running == 0, "what it asked for was given back"
    until(lambda: workers.pids[0] != before[0])
    assert workers.pids[1] == before[1]
    # Its socket stayed: whoever comes to it waits for the next one.
    until(lambda: all(is_well(url) for _ in range(12)))

    # The first signal: what runs ends, what is new is refused, and all processes end.
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: parts.services.draining)
        until(lambda: httpx.get(f"{url}/health", timeout=30).status_code == 503)
        new = httpx.post(f"{url}/v1/completions", json=BODY, timeout=30)
        assert new.status_code == 503
        assert json.loads(new.text)["error"]["code"] == "draining"
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_workers_answer_and_die_and_end(
    build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # for the library in memory, whose objects workers meet
    parts = build(port=0, shutdown_timeout=30.0)
    config = parts.services.config
    failures: list[BaseException] = []

    with started(2) as workers:

        def visitor() -> None:
            said = ""
            try:

                def heard() -> bool:
                    nonlocal said
                    said += capsys.readouterr().out
                    return "listening on" in said

                until(heard)
                assert f"listening on {workers.url}\n" in said
                visit(workers, parts)
            except BaseException as failure:
                failures.append(failure)
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=visitor)
        thread.start()
        code = serve_apart(parts.services, config, workers)
        thread.join(PATIENCE_S)
    if failures:
        raise failures[0]
    assert code == 0
    assert not parts.services.engine.alive
    for pid in workers.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_port_that_another_server_has_is_refused(build: Build) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other, started(1) as workers:
        parts = build(port=other.getsockname()[1])
        with pytest.raises(ValueError, match="cannot listen on"):
            serve_apart(parts.services, parts.services.config, workers)


def test_a_worker_that_does_not_listen_is_spoken_of_and_does_not_hold_up_the_end(
    build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LATE_S", 0.05)
    monkeypatch.setattr(serving, "FLUSH_S", 0)
    parts = build(port=0)
    with caplog.at_level(logging.WARNING), started(1) as workers:
        os.kill(workers.pids[0], signal.SIGSTOP)

        def interrupt() -> None:
            try:
                until(lambda: f"HTTP process to listen pid={workers.pids[0]}" in caplog.text)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert serve_apart(parts.services, parts.services.config, workers) == 0
        thread.join(PATIENCE_S)
        assert f"HTTP process to listen pid={workers.pids[0]}" in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(workers.pids[0], 0)


def test_a_worker_for_which_there_is_no_room_is_tried_again(
    build: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_AGAIN_S", 0.01)
    monkeypatch.setattr(serving, "FLUSH_S", 0)
    parts = build(port=0)
    with caplog.at_level(logging.WARNING), started(1) as workers:
        process = processes._Process
        failures = iter([OSError("too many processes")])

        def short() -> Any:
            for failure in failures:
                raise failure
            return process()

        def visitor() -> None:
            try:
                until(lambda: workers.hosts and workers.hosts[0].listening.is_set())
                until(lambda: is_well(workers.url))
                monkeypatch.setattr(processes, "_Process", short)
                before = workers.pids[0]
                os.kill(before, signal.SIGKILL)
                until(lambda: workers.pids[0] != before)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=visitor)
        thread.start()
        assert serve_apart(parts.services, parts.services.config, workers) == 0
        thread.join(PATIENCE_S)
    assert "did not start: too many processes" in caplog.text
