"""A backup taken while adapters are being uploaded is whole, and so is what is restored from it."""

import hashlib
import shutil
import sqlite3
import threading
from pathlib import Path

from shoal.adapters.registry.catalog import Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.doctor import examine
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import LocalStore

BASE = "b" * 64


def test_database_first_then_the_store_while_uploads_go_on(tmp_path: Path) -> None:
    live, saved = tmp_path / "live.db", tmp_path / "saved.db"
    registry = Registry.open(f"sqlite:///{live}", base_digest=BASE)
    published: list[str] = []

    def upload(number: int) -> None:
        data = b"%d" % number * 50
        digest = hashlib.sha256(data).hexdigest()
        content = Content(digest, "lora", "lora", 8, len(data), 1024, None)
        registry.publish(f"a{number}", content, data)
        published.append(f"a{number}")

    stop = threading.Event()

    def uploads() -> None:
        while not stop.is_set():
            upload(len(published))

    thread = threading.Thread(target=uploads)
    for _ in range(5):
        upload(len(published))
    thread.start()
    try:
        before = len(published)
        with sqlite3.connect(live) as connection:
            connection.execute("VACUUM INTO ?", (str(saved),))
        connection.close()
        while len(published) < before + 3:  # uploads between the two copies
            stop.wait(0.001)
        shutil.copytree(f"{live}.store", f"{saved}.store", ignore=lambda *_: ["temporary"])
    finally:
        stop.set()
        thread.join()
    registry.close()

    restored = Registry.open(f"sqlite:///{saved}", base_digest=BASE)
    names = [info.name for info in restored.page(limit=1000)[0]]
    assert set(published[:before]) <= set(names)
    for name in names:
        info = restored.resolve(name)
        assert hashlib.sha256(restored.read(info.digest)).hexdigest() == info.digest
    restored.check()
    restored.close()
    database = Database(f"sqlite:///{saved}")
    report = examine(database, LocalStore(Path(f"{saved}.store")), tmp_path / "none")
    assert report.healthy
    assert report.records == len(names)
    database.close()
