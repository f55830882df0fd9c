"""Fused norms: the same output and gradient, and only where they are that."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from shoal.adapters.training.norms import fuse_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_outputs_and_gradients_stay(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kind(24, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(24))
    x, other = (torch.randn(2, 5, 24).to(dtype) for _ in range(2))
    x.requires_grad_()
    norm(x).backward(other)
    expected = norm(x.detach())
    assert x.grad is not None
    gradient, x.grad = x.grad, None
    assert fuse_norms(norm) == 1
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(norm(x.detach()), expected, atol=tolerance, rtol=tolerance)
    norm(x).backward(other)
    torch.testing.assert_close(x.grad, gradient, atol=tolerance, rtol=tolerance)


class OddRMSNorm(nn.Module):
    """Called so, but something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(24)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True).sqrt() + 0.1) * self.weight


def test_what_is_no_rms_norm_is_left_alone() -> None:
    norm = OddRMSNorm()
    x = torch.randn(3, 24)
    expected = norm(x)
    assert fuse_norms(norm) == 0
    assert torch.equal(norm(x), expected)
