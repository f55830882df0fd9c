"""Test-wide setup: Triton's interpreter, markers by folder, a clean environment."""

import os
from pathlib import Path

# Triton reads this when the first kernel is defined, so it must be set before any import of one.
if "SHOAL_TEST_GPU" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers of pytest-xdist share the cores; threads that wait for each other would waste them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything under tests/gpu as needing a GPU, and skip it visibly without one."""
    gpu_tests = [item for item in items if TESTS / "gpu" in item.path.parents]
    if not gpu_tests:
        return
    import torch

    for item in gpu_tests:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def clean_environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own registry."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg-data"))
