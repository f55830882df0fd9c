"""Rotary embeddings in fewer kernels: same output and gradient, and only where they are that."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from shoal.adapters.training.loss import LaneLoss
from shoal.adapters.training.rotary import fuse_rotary, rotate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # As attention has them: (rows, length, heads, d) in memory. Halves of cos and sin may differ.
    q, k = (torch.randn(2, 5, heads, 8).to(dtype).transpose(1, 2) for heads in (6, 3))
    cos, sin = (torch.randn(2, 5, 8).to(dtype) for _ in range(2))
    outputs: list[tuple[Tensor, ...]] = []
    for apply in (apply_rotary_pos_emb, rotate):
        own = [x.detach().requires_grad_() for x in (q, k)]
        out = apply(*own, cos, sin)
        loss = sum((x.double().sin() * index).sum() for index, x in enumerate(out, 1))
        outputs.append((*out, *torch.autograd.grad(loss, own)))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for wanted, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert outputs[1][0].stride() == q.stride()


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7)).logits


def test_a_decoder_gives_the_same_logits_and_so_does_its_copy() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    before = logits(model)
    assert fuse_rotary(model) == 2
    assert fuse_rotary(model) == 0  # once is enough
    assert (
        rotate
        is model.model.layers[1].self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
    )
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    other = copy.deepcopy(model)
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    torch.testing.assert_close(logits(other), before, atol=1e-6, rtol=1e-5)


def test_what_rotates_neighbours_is_left_alone() -> None:
    model = CohereForCausalLM(CohereConfig(**SMALL, pad_token_id=0)).eval()
    before = logits(model)
    assert fuse_rotary(model) == 0
    assert torch.equal(logits(model), before)


def test_losses_are_computed_with_what_is_fused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    LaneLoss(model)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm):
            assert "forward" in vars(module)
