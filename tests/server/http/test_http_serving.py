"""The process's own behaviour: it says where it listens, drains on a signal, obeys a second one."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.server.config import ServeConfig
from shoal.server.http.serving import serve

Build = Callable[..., Any]


class Visitor(threading.Thread):
    """Does ``visit(url)`` once the server says where it listens; keeps what went wrong."""

    def __init__(self, capsys: pytest.CaptureFixture[str], visit: Callable[[str], None]) -> None:
        super().__init__()
        self._capsys = capsys
        self._visit = visit
        self.failure: BaseException | None = None

    def run(self) -> None:
        said = ""
        while not (found := re.search(r"listening on (http://127\.0\.0\.1:\d+)$", said, re.M)):
            time.sleep(0.01)
            said += self._capsys.readouterr().out
        try:
            self._visit(found[1])
        except BaseException as failure:
            self.failure = failure
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self) -> None:
        self.join(10)
        if self.failure is not None:
            raise self.failure


BODY = {"model": "base", "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}


def test_a_signal_lets_running_streams_end_and_exits_with_0(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = build(port=0, shutdown_timeout=10.0)
    parts.gate.delay_s = 0.005
    seen: dict[str, Any] = {}

    def visit(url: str) -> None:
        with (
            httpx.Client(base_url=url, timeout=10) as client,
            client.stream("POST", "/v1/completions", json=BODY) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            while not parts.services.draining:
                time.sleep(0.001)
            seen["health"] = httpx.get(f"{url}/health").status_code
            seen["new"] = httpx.post(f"{url}/v1/completions", json=BODY).status_code
            seen["last"] = [line for line in lines if line][-1]

    visitor = Visitor(capsys, visit)
    visitor.start()
    code = serve(parts.app, parts.services, parts.services.config)
    visitor.finish()
    assert code == 0
    assert seen == {"health": 503, "new": 503, "last": "data: [DONE]"}
    assert not parts.services.engine.alive


def test_what_outlasts_the_timeout_is_told_so_and_the_exit_is_still_0(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = build(port=0, shutdown_timeout=0.0)
    parts.gate.delay_s = 0.02
    seen: list[str] = []

    def visit(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=10) as stream:
            for line in stream.iter_lines():
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                seen.append(line)

    visitor = Visitor(capsys, visit)
    visitor.start()
    code = serve(parts.app, parts.services, parts.services.config)
    visitor.finish()
    assert code == 0
    assert '"code":"draining"' in [line for line in seen if line][-1]


def test_a_second_signal_ends_it_at_once_and_every_client_is_told(
    build: Build, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    parts = build(port=0, shutdown_timeout=60.0)
    parts.gate.delay_s = 0.02
    whole: list[httpx.Response] = []

    def ask(url: str) -> None:
        body = BODY | {"stream": False}
        whole.append(httpx.post(f"{url}/v1/completions", json=body, timeout=10))

    def visit(url: str) -> None:
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=10) as stream:
            lines = stream.iter_lines()
            next(lines)
            while parts.services.in_flight < 2:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            while not parts.services.draining:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
            last = [line for line in lines if line][-1]
        asking.join(10)
        assert '"code":"draining"' in last
        assert whole[0].status_code == 503
        assert whole[0].json()["error"]["code"] == "draining"

    visitor = Visitor(capsys, visit)
    visitor.start()
    began = time.monotonic()
    code = serve(parts.app, parts.services, parts.services.config)
    visitor.finish()
    assert code == 1
    assert time.monotonic() - began < 3
    assert "Traceback" not in caplog.text
    assert not parts.services.engine.alive


def test_a_taken_port_is_named(build: Build) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        parts = build(port=port)
        with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve(parts.app, parts.services, ServeConfig(port=port))
