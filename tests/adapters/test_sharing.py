"""Who sees what, and that nobody learns of what they do not see."""

import itertools
import random

import pytest
from tests.adapters.databases import BASE, content

from shoal.adapters.errors import AdapterNameInvalid, AdapterNotFound, AdapterRejected
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.sharing import GRANTEES_MAX

OWNERS = ("ann", "bob", "cy")


@pytest.fixture
def catalogs(database: Database) -> dict[str, Catalog]:
    return {owner: Catalog(database, base_digest=BASE, owner=owner) for owner in OWNERS}


def shared(catalog: Catalog, limit: int = 2) -> list[str]:
    found: list[str] = []
    after = None
    while True:
        page, after = catalog.shared_page(limit=limit, after=after)
        assert len(page) <= limit
        found += [f"{info.owner}/{info.name}" for info in page]
        if after is None:
            return found


def test_random_sharing_agrees_with_a_set(catalogs: dict[str, Catalog]) -> None:
    rng = random.Random(0)
    live: set[tuple[str, str]] = set()
    grants: set[tuple[str, str, str | None]] = set()
    for step in range(120):
        owner, name = rng.choice(OWNERS), rng.choice("xyz")
        catalog = catalogs[owner]
        whom = rng.choice([None, *(other for other in OWNERS if other != owner)])
        action = rng.choice(["publish", "publish", "share", "share", "unshare", "delete"])
        if action == "publish":
            catalog.publish(name, content(step), created=step)
            live.add((owner, name))
        elif (owner, name) not in live:
            for call in (
                lambda c=catalog, n=name, w=whom: c.share(n, w),
                lambda c=catalog, n=name, w=whom: c.unshare(n, w),
                lambda c=catalog, n=name: c.grantees(n),
            ):
                with pytest.raises(AdapterNotFound):
                    call()
        elif action == "share":
            catalog.share(name, whom)
            grants.add((owner, name, whom))
        elif action == "unshare":
            catalog.unshare(name, whom)
            grants.discard((owner, name, whom))
        else:
            catalog.delete(name, now=step)
            live.remove((owner, name))
            grants = {grant for grant in grants if grant[:2] != (owner, name)}
        reader = rng.choice(OWNERS)
        visible = {(o, n) for o, n, whom in grants if whom in (None, reader) and o != reader}
        assert shared(catalogs[reader]) == sorted(f"{o}/{n}" for o, n in visible)
        for o, n in itertools.product(OWNERS, "xyz"):
            if (o, n) in visible or ((o, n) in live and o == reader):
                info = catalogs[reader].get(f"{o}/{n}")
                assert (info.owner, info.name) == (o, n)
                assert catalogs[reader].versions(f"{o}/{n}")[-1].owner == o
            else:
                with pytest.raises(AdapterNotFound):
                    catalogs[reader].get(f"{o}/{n}")
    catalogs["ann"].check()


def test_what_is_not_visible_is_what_does_not_exist(catalogs: dict[str, Catalog]) -> None:
    ann, bob = catalogs["ann"], catalogs["bob"]
    ann.publish("there", content(1), created=0.0)
    ann.share("there", "cy")

    def said(reference: str) -> list[str]:
        texts = []
        for call in (
            lambda: bob.get(reference),
            lambda: bob.get(reference, 1),
            lambda: bob.versions(reference),
            lambda: bob.activate(reference, 1),
            lambda: bob.delete(reference, now=0.0),
            lambda: bob.tag(reference, {}),
            lambda: bob.share(reference, None),
            lambda: bob.grantees(reference),
        ):
            with pytest.raises(AdapterNotFound) as caught:
                call()
            texts.append(str(caught.value).replace(reference, "…"))
        return texts

    assert said("ann/there") == said("ann/not-there") == said("nobody/there")
    assert bob.publish("there", content(2), created=0.0).version == 1
    assert bob.page(limit=9)[0][0].digest == content(2).digest
    assert bob.shared_page(limit=9) == ([], None)
    assert bob.count() == 1


def test_whoever_sees_an_adapter_may_not_change_it(catalogs: dict[str, Catalog]) -> None:
    ann, bob = catalogs["ann"], catalogs["bob"]
    first = ann.publish("a", content(1), created=0.0)
    ann.publish("a", content(2), created=0.0)
    ann.share("a", "bob")
    assert bob.get("ann/a", 1).digest == first.digest
    for call in (
        lambda: bob.activate("ann/a", 1),
        lambda: bob.delete("ann/a", now=0.0),
        lambda: bob.tag("ann/a", {"k": "v"}),
        lambda: bob.share("ann/a", "cy"),
        lambda: bob.unshare("ann/a", "bob"),
        lambda: bob.grantees("ann/a"),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    with pytest.raises(AdapterNameInvalid):
        bob.publish("ann/a", content(3), created=0.0)
    assert ann.get("a").version == 2
    assert ann.grantees("a") == ["bob"]
    # One's own may be written in full.
    assert ann.activate("ann/a", 1).version == 1


def test_an_upload_under_a_deleted_name_is_not_shared(catalogs: dict[str, Catalog]) -> None:
    ann, bob = catalogs["ann"], catalogs["bob"]
    ann.publish("a", content(1), created=0.0)
    ann.share("a", None)
    ann.tag("a", {"k": "v"})
    ann.delete("a", now=0.0)
    again = ann.publish("a", content(1), created=0.0)
    assert (again.tags, ann.grantees("a")) == ({}, [])
    with pytest.raises(AdapterNotFound):
        bob.get("ann/a")


def test_sharing_twice_is_sharing_once_and_with_oneself_is_refused(
    catalogs: dict[str, Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = catalogs["ann"]
    ann.publish("a", content(1), created=0.0)
    for whom in (None, "bob", "bob", None):
        ann.share("a", whom)
    assert ann.grantees("a") == [None, "bob"]
    assert shared(catalogs["bob"]) == ["ann/a"]
    for bad in ("ann", "*", "", "B", "a/b"):
        with pytest.raises(AdapterRejected):
            ann.share("a", bad)
    assert GRANTEES_MAX >= 100
    monkeypatch.setattr("shoal.adapters.registry.sharing.GRANTEES_MAX", 2)
    with pytest.raises(AdapterRejected, match="limit"):
        ann.share("a", "cy")
    ann.unshare("a", None)
    ann.unshare("a", None)
    ann.share("a", "cy")
    assert ann.grantees("a") == ["bob", "cy"]


def test_another_bases_shared_adapters_are_invisible(database: Database) -> None:
    ann = Catalog(database, base_digest="c" * 64, owner="ann")
    ann.publish("a", content(1), created=0.0)
    ann.share("a", None)
    bob = Catalog(database, base_digest=BASE, owner="bob")
    assert bob.shared_page(limit=9) == ([], None)
    with pytest.raises(AdapterNotFound):
        bob.get("ann/a")


@pytest.mark.parametrize(
    "reference", ["/a", "ann/", "ann//a", "ann/a/a", "Ann/a", "*/a", "ann/a\x00", "\ud800/a", "/"]
)
def test_what_is_no_reference_is_not_found(catalogs: dict[str, Catalog], reference: str) -> None:
    catalogs["ann"].publish("a", content(1), created=0.0)
    catalogs["ann"].share("a", None)
    with pytest.raises(AdapterNotFound):
        catalogs["bob"].get(reference)
    with pytest.raises(AdapterNotFound):
        catalogs["bob"].versions(reference)


def test_tags_are_the_names_and_bounded(catalogs: dict[str, Catalog]) -> None:
    ann = catalogs["ann"]
    ann.publish("a", content(1), created=0.0)
    assert ann.tag("a", {"team": "Zürich ✓", "stage": ""}).tags == {
        "stage": "",
        "team": "Zürich ✓",
    }
    ann.publish("a", content(2), created=0.0)
    assert ann.page(limit=1)[0][0].tags["team"] == "Zürich ✓"
    bad: list[dict[object, object]] = [
        {str(n): "" for n in range(17)},
        {"": "x"},
        {"Team": "x"},
        {"k": "x" * 257},
        {"k": 1},
        {"k": "\x00"},
        {"k": "\ud800"},
        {1: "x"},
    ]
    for tags in bad:
        with pytest.raises(AdapterRejected, match=r"^tag"):
            ann.tag("a", tags)  # type: ignore[arg-type]
    assert len(ann.get("a").tags) == 2
    assert ann.tag("a", {}).tags == {}
    with pytest.raises(AdapterNotFound):
        ann.tag("b", {})
