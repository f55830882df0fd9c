"""Test-wide setup: Triton's interpreter, markers by folder, a clean environment."""

import os
from pathlib import Path

# Triton reads this when the first kernel is defined, so it must be set before any import of one.
if "SHOAL_TEST_GPU" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
