"""Uploads prepared beside the server: the same bytes, the same refusals, and nothing lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.adapters import apart
from shoal.adapters.apart import Helpers, Made, Setup, make_setup
from shoal.adapters.apart_worker import _Known, answer
from shoal.adapters.basis import make_basis, sketch
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.writing import write_compact_lora_xs
from shoal.adapters.preparing import Packing, Prepared
from shoal.adapters.reading import adapter_files

HERE = ("lora", "lora_rs", "miss", "miss_mini", "bone")
REFUSED = ("lora_head", "lora_bias")
# They bring factors that are compared with the base's weights, or are made from them.
SERVERS = ("lora_dora", "xs_new_key", "xs_rank_8", "tinylora", "lora_pissa")
BYTES_MAX = 1 << 20
START_S = 120.0  # for a process to start on a busy machine


def setup_of(golden: Any) -> Setup:
    packing = Packing(golden.shape, torch.float32, BYTES_MAX)
    return make_setup(packing, golden.canonical, max_bytes=BYTES_MAX, max_bases=4, spectral=False)


def compact(golden: Any, folder: Path, seed: int = 0) -> Path:
    rng = torch.Generator().manual_seed(seed)
    r = {target: torch.randn(4, 4, generator=rng) for target in golden.shape.targets()}
    write_compact_lora_xs(folder, r, alpha=4, rank=4, basis=golden.canonical, shape=golden.shape)
    return folder


def by_the_server(golden: Any, folder: Path) -> Prepared:
    return setup_of(golden).packing.prepare(golden.read(folder))


def assert_same(made: Prepared, wanted: Prepared) -> None:
    assert (made.content, made.record) == (wanted.content, wanted.record)
    assert made.packed.spec == wanted.packed.spec
    assert made.packed.data.dtype == wanted.packed.data.dtype
    assert torch.equal(made.packed.data, wanted.packed.data)


@pytest.mark.parametrize("case", HERE)
def test_a_helper_makes_what_the_server_would_have_made(golden: Any, case: str) -> None:
    folder = golden.copy(case)
    found = answer(setup_of(golden), adapter_files(folder), _Known())
    assert isinstance(found, Made)
    assert_same(found.prepared(torch.float32), by_the_server(golden, folder))


@pytest.mark.parametrize("case", REFUSED)
def test_a_helper_refuses_what_the_server_would_have_refused(golden: Any, case: str) -> None:
    folder = golden.copy(case)
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(folder)
    found = answer(setup_of(golden), adapter_files(folder), _Known())
    assert isinstance(found, AdapterRejected)
    assert str(found) == str(refusal.value)


def test_compact_files_are_compared_with_probes_alone(golden: Any, tmp_path: Path) -> None:
    folder = compact(golden, tmp_path / "a")
    found = answer(setup_of(golden), adapter_files(folder), _Known())
    assert isinstance(found, Made)
    assert_same(found.prepared(torch.float32), by_the_server(golden, folder))
    tensors = golden.tensors(folder)
    name = next(name for name in tensors if name.endswith("basis_probe"))
    golden.save(folder, {**tensors, name: -tensors[name]})
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(folder)
    found = answer(setup_of(golden), adapter_files(folder), _Known())
    assert isinstance(found, AdapterRejected)
    assert str(found) == str(refusal.value)


@pytest.mark.parametrize("case", SERVERS)
def test_what_needs_the_base_is_left_to_the_server(golden: Any, case: str) -> None:
    assert answer(setup_of(golden), adapter_files(golden.copy(case)), _Known()) is None


def test_a_compact_file_on_an_uploaded_basis(golden: Any, tmp_path: Path) -> None:
    own = make_basis(
        {t: factor[:, [1, 0]] for t, factor in golden.canonical.factors.items()},
        kind="uploaded",
        base_digest=golden.shape.digest,
    )
    golden.bases.add(own)
    known = _Known()
    r = {target: torch.eye(2) for target in own.factors}
    write_compact_lora_xs(tmp_path / "a", r, alpha=4, rank=2, basis=own, shape=golden.shape)
    files = adapter_files(tmp_path / "a")
    assert isinstance(answer(setup_of(golden), files, known), AdapterRejected)
    known.bases = (sketch(own),)
    found = answer(setup_of(golden), files, known)
    assert isinstance(found, Made)
    assert found.content.basis_id == own.id
    assert_same(found.prepared(torch.float32), by_the_server(golden, tmp_path / "a"))


# -- processes ------------------------------------------------------------------------------------


@pytest.fixture
def helpers(golden: Any) -> Iterator[Helpers]:
    made = Helpers(setup_of(golden), 1)
    yield made
    made.close()


def prepared(helpers: Helpers, folder: Path) -> Prepared:
    """By a process; until one has started there is no answer."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        found = helpers.prepare(adapter_files(folder), ())
        if found is not None:
            return found
        time.sleep(0.05)
    raise AssertionError("no helper started")


def test_a_process_prepares_refuses_and_is_replaced_when_it_dies(
    golden: Any, helpers: Helpers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compact(golden, tmp_path / "a")
    files = adapter_files(folder)
    assert helpers.prepare(files, ()) is None, "nobody waits for a process to start"
    assert_same(prepared(helpers, folder), by_the_server(golden, folder))
    (first,) = helpers._helpers
    bad = golden.edit_config(compact(golden, tmp_path / "bad"), r=5)
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(bad)
    with pytest.raises(AdapterRejected) as refused:
        helpers.prepare(adapter_files(bad), ())
    assert str(refused.value) == str(refusal.value)
    assert (refused.value.where, refused.value.rule) == (refusal.value.where, refusal.value.rule)

    with monkeypatch.context() as patch:
        patch.setattr(apart, "BYTES_MAX", 10)
        assert helpers.prepare(files, ()) is None, "large files are the server's"

    os.kill(first.pid, signal.SIGKILL)
    assert helpers.prepare(files, ()) is None, "what it was to do is the server's"
    other = compact(golden, tmp_path / "b", seed=1)
    assert_same(prepared(helpers, other), by_the_server(golden, other))
    (second,) = helpers._helpers
    assert second.pid != first.pid
    helpers.close()
    assert second._process.poll() is not None
    assert helpers.prepare(files, ()) is None


def test_one_that_cannot_start_is_not_tried_for_ever(
    golden: Any, helpers: Helpers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def fail(self: object, setup: Setup) -> None:
        starts.append(1)
        raise EOFError

    monkeypatch.setattr(apart._Helper, "__init__", fail)
    files = adapter_files(compact(golden, tmp_path / "a"))
    for _ in range(200):
        assert helpers.prepare(files, ()) is None
        time.sleep(0.001)
    end = time.monotonic() + START_S
    while len(starts) < apart.DEATHS_MAX and time.monotonic() < end:
        assert helpers.prepare(files, ()) is None
    assert len(starts) == apart.DEATHS_MAX


def test_a_process_ends_with_its_server() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.adapters.apart_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(START_S) == 0
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdout.close()
