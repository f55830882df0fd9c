"""Clients of a server that may be killed at any moment: writers of adapters, and readers."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.e2e.crash_history import History, State
from tests.e2e.crash_server import Server

ANSWER_TOKENS = 6
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Material:
    """One adapter to upload, and what the base answers with it.

    Attributes:
        answers: prompt -> the greedy tokens, from an implementation that is not ours.
    """

    files: Mapping[str, Path]
    answers: Mapping[tuple[int, ...], list[int]]


@dataclass
class World:
    """What the test knows, shared by all its clients; thread-safe.

    Attributes:
        names: by writer.
        digests: content -> digest, as far as the server has told.
    """

    materials: Sequence[Material]
    names: Sequence[Sequence[str]]
    histories: dict[str, History] = field(init=False)
    digests: dict[int, str] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=lambda: {"upload": 0, "activate": 0, "rm": 0})
    reads: dict[str, int] = field(default_factory=lambda: {"served": 0, "not found": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.histories = {name: History() for names in self.names for name in names}

    def learn(self, content: int, digest: str) -> None:
        """The same content has the same digest for ever, and no other content has it."""
        with self.lock:
            assert self.digests.setdefault(content, digest) == digest
            assert len(set(self.digests.values())) == len(self.digests)

    def content_of(self, tokens: list[int], prompt: tuple[int, ...]) -> int | None:
        """Which adapter answers ``prompt`` like this."""
        for content, material in enumerate(self.materials):
            if material.answers[prompt] == tokens:
                return content
        return None

    def ask(
        self, client: httpx.Client, model: str, prompt: tuple[int, ...]
    ) -> tuple[int, int] | None:
        """Version and content that ``model`` is answered with now; None when it is not found.

        Raises:
            httpx.TransportError: the server died.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = client.post("/v1/completions", json=body)
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, (model, answer.status_code, answer.text)
        name, _, version = answer.headers["x-shoal-adapter"].partition("@")
        assert name == model.partition("@")[0]
        tokens = answer.json()["choices"][0]["token_ids"]
        content = self.content_of(tokens, prompt)
        assert content is not None, f"{model}: {tokens} are no adapter's tokens"
        return int(version), content

    def look(self, client: httpx.Client, model: str) -> tuple[int, None] | None:
        """As ``ask``, by a request that is answered in no time and shows no content."""
        answer = client.get(f"/v1/adapters/{model}")
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, (model, answer.status_code, answer.text)
        return int(answer.json()["version"]), None


class Visit:
    """All clients of one server, until it dies or they have made their changes.

    Args:
        changes: how many to make. With the last of them the fuse is lit, and changes go on.
        fuse: returns when to kill. None: no kill, everybody ends in peace.
    """

    def __init__(
        self,
        world: World,
        server: Server,
        *,
        changes: int,
        fuse: Callable[[], None] | None,
        seed: int,
    ) -> None:
        self._world = world
        self._server = server
        self._changes = changes
        self._fuse = fuse
        self._seed = seed
        self._sent = 0
        self._killed = threading.Event()
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        self.unanswered = 0

    def run(self, readers: int = 3) -> None:
        """Until the server is dead, or the changes are made; raises what went wrong."""
        writers = [
            threading.Thread(target=self._guarded, args=(self._write, names, number))
            for number, names in enumerate(self._world.names)
        ]
        reading = [
            threading.Thread(target=self._guarded, args=(self._read, number))
            for number in range(readers)
        ]
        for thread in writers + reading:
            thread.start()
        for thread in writers:
            thread.join()
        self._over.set()
        for thread in reading:
            thread.join()
        if self._failures:
            raise self._failures[0]
        assert self._killed.is_set() == (self._fuse is not None)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            with httpx.Client(
                base_url=self._server.url, timeout=_TIMEOUT_S, trust_env=False
            ) as client:
                work(client, *arguments)
        except httpx.TransportError as error:
            if not self._killed.wait(5):
                self._failures.append(error)
                self._over.set()
        except BaseException as error:
            self._failures.append(error)
            self._over.set()

    def _may_send(self) -> bool:
        """Count a change; the last one lights the fuse, or is the last one."""
        with self._world.lock:
            self._sent += 1
            if self._sent > self._changes:
                return self._fuse is not None and not self._over.is_set()
            if self._sent == self._changes and self._fuse is not None:
                threading.Thread(target=self._kill, args=(self._fuse,)).start()
            return not self._over.is_set()

    def _kill(self, fuse: Callable[[], None]) -> None:
        fuse()
        self._killed.set()
        self._server.kill()

    # ---------------------------------------------------------------------------------- writing

    def _write(self, client: httpx.Client, names: Sequence[str], number: int) -> None:
        rng = random.Random(f"{self._seed} writer {number}")
        world = self._world
        while not self._over.is_set():
            name = rng.choice(names)
            history = world.histories[name]
            kind, change = self._draw(rng, history.state)
            after, send = change(client, name)
            world.look(client, name)  # so that whoever remembers has something to forget
            if not self._may_send():
                return
            history.send(after)
            with world.lock:
                world.changes[kind] += 1
                self.unanswered += 1
            send()
            history.acknowledge()
            with world.lock:
                self.unanswered -= 1
            seen = world.look(client, name)
            assert history.explain(history.mark(), None, seen), (name, seen, "after", kind)
            time.sleep(rng.choice([0.0, 0.0, rng.uniform(0.0, 0.03)]))

    def _draw(self, rng: random.Random, state: State) -> tuple[str, Callable[..., Any]]:
        kind = rng.choices(["upload", "activate", "rm"], [50, 30, 20])[0]
        if state.active is None or kind == "upload":
            content = rng.randrange(len(self._world.materials))
            return "upload", lambda *where: self._upload(*where, state, content)
        if kind == "activate":
            version = rng.choice(list(state.versions))
            return kind, lambda *where: self._activate(*where, state, version)
        return kind, lambda *where: self._delete(*where, state)

    def _upload(
        self, client: httpx.Client, name: str, state: State, content: int
    ) -> tuple[State, Callable[[], None]]:
        after = state.uploaded(content)
        material = self._world.materials[content]
        files = [("file", (n, p.read_bytes())) for n, p in sorted(material.files.items())]

        def send() -> None:
            answer = client.post("/v1/adapters", data={"name": name}, files=files)
            assert answer.status_code == 201, answer.text
            said = answer.json()
            assert (said["name"], said["version"]) == (name, after.active)
            self._world.learn(content, said["digest"])

        return after, send

    def _activate(
        self, client: httpx.Client, name: str, state: State, version: int
    ) -> tuple[State, Callable[[], None]]:
        def send() -> None:
            answer = client.post(f"/v1/adapters/{name}/activate", json={"version": version})
            assert answer.status_code == 200, answer.text
            assert answer.json()["version"] == version

        return state.activated(version), send

    def _delete(
        self, client: httpx.Client, name: str, state: State
    ) -> tuple[State, Callable[[], None]]:
        def send() -> None:
            answer = client.delete(f"/v1/adapters/{name}")
            assert answer.status_code == 204, answer.text

        return state.deleted(), send

    # ---------------------------------------------------------------------------------- reading

    def _read(self, client: httpx.Client, number: int) -> None:
        rng = random.Random(f"{self._seed} reader {number}")
        world = self._world
        names = sorted(world.histories)
        prompts = sorted(world.materials[0].answers)
        while not self._over.is_set():
            live = [name for name in names if world.histories[name].state.versions]
            name = rng.choice(live if live and rng.random() < 0.8 else names)
            history = world.histories[name]
            latest = history.state.following
            asked = rng.choice([None, None, rng.randint(max(1, latest - 3), latest)])
            since = history.mark()
            model = name if asked is None else f"{name}@{asked}"
            if rng.random() < 0.5:
                looked = world.look(client, model)
                assert history.explain(since, asked, looked), (model, looked)
                continue
            seen = world.ask(client, model, rng.choice(prompts))
            assert history.explain(since, asked, seen), (model, seen)
            with world.lock:
                world.reads["not found" if seen is None else "served"] += 1


def settle(world: World, url: str) -> None:
    """Compare all that a restarted server holds with what it may hold."""
    prompt = sorted(world.materials[0].answers)[-1]
    with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        listed = client.get("/v1/adapters", params={"limit": 1000}).json()
        assert not listed["has_more"]
        for name, history in world.histories.items():
            found = client.get(f"/v1/adapters/{name}/versions")
            versions = found.json()["data"] if found.status_code == 200 else []
            may_be = [history.state]
            if history.unanswered is not None:
                may_be.append(history.unanswered.state)
            [now, *_] = [s for s in may_be if _holds(world, s, versions)] or [None]
            assert now is not None, (name, versions, may_be, world.digests)
            if history.unanswered is not None:
                history.settle(now is history.unanswered.state)
            # And it is served: all of it, where something was under way.
            whole = list(now.versions) if len(may_be) > 1 else []
            for asked in [None, *whole]:
                model = name if asked is None else f"{name}@{asked}"
                assert world.ask(client, model, prompt) == now.answers(asked), model
        live = {name for name, history in world.histories.items() if history.state.versions}
        assert {info["name"] for info in listed["data"]} == live


def _holds(world: World, state: State, versions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are the versions of ``state``; learns the digest of an unanswered upload."""
    if [v["version"] for v in versions] != sorted(state.versions):
        return False
    for said in versions:
        content = state.versions[said["version"]]
        if said["active"] != (said["version"] == state.active):
            return False
        if world.digests.get(content, said["digest"]) != said["digest"]:
            return False
    for said in versions:
        world.learn(state.versions[said["version"]], said["digest"])
    return True
