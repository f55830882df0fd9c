"""Servers on one registry: what one has answered, the next request to the other goes by."""

import random
from pathlib import Path
from typing import Any

import httpx
from tests.adapters.databases import database_url, postgres
from tests.e2e.crash_clients import World
from tests.e2e.crash_server import Forge
from tests.e2e.test_crash import FLAGS, PROMPTS, materials

__all__ = ["database_url", "postgres"]


def test_servers_see_each_others_changes_with_the_next_request(
    forge: Forge, tiny: Any, make_adapter: Any, tmp_path: Path, database_url: str
) -> None:
    world = World(materials(tiny, make_adapter, 4), [["a", "b"]])
    place = (f"--registry={database_url}", f"--store={tmp_path}/store")
    servers = [forge.start(*FLAGS, *place) for _ in range(2)]
    clients = [httpx.Client(base_url=s.url, timeout=60, trust_env=False) for s in servers]
    rng = random.Random(4)
    done = []
    for step in range(16):
        name = rng.choice("ab")
        state = world.histories[name].state
        client = clients[step % 2]
        for other in clients:  # whoever remembers has something to forget
            world.look(other, name)
        kinds = ["upload", "activate", "rm"] if state.versions else ["upload"]
        kind = rng.choice(kinds)
        if kind == "upload":
            content = rng.randrange(4)
            files = [
                ("file", (file, path.read_bytes()))
                for file, path in world.materials[content].files.items()
            ]
            after = state.uploaded(content)
            answer = client.post("/v1/adapters", data={"name": name}, files=files)
        elif kind == "activate":
            after = state.activated(rng.choice(list(state.versions)))
            body = {"version": after.active}
            answer = client.post(f"/v1/adapters/{name}/activate", json=body)
        else:
            after = state.deleted()
            answer = client.delete(f"/v1/adapters/{name}")
        assert answer.is_success, answer.text
        world.histories[name].send(after)
        world.histories[name].acknowledge()
        done.append(kind)
        for other in reversed(clients):
            looked = world.look(other, name)
            assert world.histories[name].explain(world.histories[name].mark(), None, looked)
        for other in reversed(clients):
            for known, history in world.histories.items():
                seen = world.ask(other, known, rng.choice(PROMPTS))
                assert seen == history.state.answers(None), (step, kind, known)
    assert set(done) == {"upload", "activate", "rm"}
    for client, server in zip(clients, servers, strict=True):
        client.close()
        server.kill()
        forge.bury(server)
