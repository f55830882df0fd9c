"""What ``--attention`` means on a device, and which wishes are refused."""

import sys

import pytest
import torch

from shoal.kernels.errors import TritonMissing
from shoal.server.model import attention_xformers
from shoal.server.model.attention import resolve_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu() -> None:
    assert resolve_attention("auto", CPU) == "torch"
    assert resolve_attention("torch", CPU) == "torch"
    assert resolve_attention("auto", CUDA) == "triton"
    assert resolve_attention("triton", CUDA) == "triton"
    assert resolve_attention("torch", CUDA) == "torch"


@pytest.mark.parametrize("name", ["triton", "xformers"])
def test_a_backend_of_gpus_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}': must be torch or auto on a CPU"):
        resolve_attention(name, CPU)


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_without_triton_is_refused_and_told_what_works(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise TritonMissing("Triton is not installed")

    monkeypatch.setattr("shoal.server.model.attention.require_triton", missing)
    with pytest.raises(ValueError, match=f"'{name}': Triton is not .* --attention torch does"):
        resolve_attention(name, CUDA)
    assert resolve_attention("torch", CUDA) == "torch"


def test_an_xformers_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # an import of it fails
    attention_xformers.load_xformers.cache_clear()
    monkeypatch.setattr(attention_xformers, "version", lambda _: "3.6.0")
    with pytest.raises(ValueError, match=r"'xformers': .*pip install 'shoal\[xformers\]'"):
        resolve_attention("xformers", CUDA)
    monkeypatch.setattr(attention_xformers, "version", lambda _: "3.9.0")
    with pytest.raises(ValueError, match=r"block pointers, .* the version here is 3\.9\.0"):
        resolve_attention("xformers", CUDA)
