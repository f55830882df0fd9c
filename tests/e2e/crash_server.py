"""Real ``shoal serve`` processes that start in a second, to be killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Imports, and then forks a server for each line.
_FORGE = """
import importlib, json, os, sys
for name in ("server.assemble", "server.cli.serve", "server.http.app", "server.http.serving"):
    importlib.import_module(f"shoal.{name}")
from pathlib import Path
from shoal.server.__main__ import main
from shoal.server.model.tokenizer import Tokenizer

Tokenizer.load(Path(sys.argv[1]))  # for what it imports: five seconds' worth

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitpid(order["wait"], 0)[1], flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(main(order["arguments"]))
    print(pid, flush=True)
"""

START_S = 120


@dataclass
class Server:
    """One process.

    Attributes:
        log: file that has what it printed.
    """

    pid: int
    url: str
    log: Path

    def kill(self) -> None:
        """``kill -9``; see ``Forge.bury``."""
        os.kill(self.pid, signal.SIGKILL)


class Forge:
    """Starts servers, forked from a process that has done all the imports, which take longest."""

    def __init__(self, process: "subprocess.Popen[str]", model: Path, folder: Path) -> None:
        self._process = process
        self._model = model
        self._folder = folder
        self._count = 0
        self.alive: set[int] = set()

    def start(self, *arguments: str) -> Server:
        """``shoal serve MODEL ARGUMENTS`` on a free port; returns when it listens."""
        self._count += 1
        log = self._folder / f"server-{self._count}.log"
        log.touch()
        command = ["serve", str(self._model), *arguments, "--port=0"]
        pid = int(self._order(log=str(log), arguments=command))
        self.alive.add(pid)
        until = time.monotonic() + START_S
        while not (found := re.search(r"listening on (http://\S+)\n", log.read_text())):
            assert time.monotonic() < until, f"does not listen: {log.read_text()}"
            time.sleep(0.01)
        return Server(pid, found[1], log)

    def bury(self, server: Server) -> int:
        """Wait for the process to be gone; the signal that ended it."""
        status = int(self._order(wait=server.pid))
        self.alive.discard(server.pid)
        return os.WTERMSIG(status)

    def _order(self, **order: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@pytest.fixture(scope="session")
def forge(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Starts servers of the tiny model; what lives at the end is killed."""
    model, folder = tiny.path, tmp_path_factory.mktemp("servers")
    process = subprocess.Popen(
        [sys.executable, "-c", _FORGE, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "XDG_DATA_HOME": f"{folder}/data",
        },
    )
    made = Forge(process, model, folder)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield made
        finally:
            for pid in made.alive:
                os.kill(pid, signal.SIGKILL)
            process.kill()
