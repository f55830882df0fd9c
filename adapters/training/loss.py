"""The loss of every lane, with logits only where something is learnt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.adapters.training.attention import use_causal_attention
from shoal.adapters.training.data.batches import packed_mask
from shoal.adapters.training.errors import BaseRejected
from shoal.adapters.training.inputs import StepInputs
from shoal.adapters.training.norms import fuse_norms
from shoal.adapters.training.rotary import fuse_rotary
from shoal.adapters.training.token_loss import token_losses


class LaneLoss:
    """Computes losses of a decoder. It is called with a batch; the model is not to be called else.

    A vocabulary is large: logits of all tokens would cost more memory and time than the layers of
    a small base. The decoder's output is therefore cut down to the wanted places just before its
    last linear, whatever the decoder does to the logits after it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Hook into the model's output embedding, choose its attention, and fuse what is small.

        Raises:
            BaseRejected: it has no output embedding.
        """
        head = model.get_output_embeddings()
        if head is None:
            raise BaseRejected(f"{type(model).__name__} has no output embedding: cannot be trained")
        use_causal_attention(model)
        fuse_norms(model)
        fuse_rotary(model)
        self._model: Callable[..., Any] = model
        self._wanted: Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """``(lanes,)`` float32: each lane's negative log-likelihood, weighted and summed.

        Padding needs no mask: it stands at the right, where a causal model cannot look, and is not
        supervised.
        """
        packed: dict[str, Tensor | None] = {}
        if inputs.segments is not None:
            mask = packed_mask(inputs.segments)
            packed = {"attention_mask": mask, "position_ids": inputs.position_ids}
        self._wanted = inputs.positions.flatten()
        try:
            output = self._model(input_ids=inputs.input_ids, use_cache=False, **packed)
        finally:
            self._wanted = None
        nll = token_losses(output.logits[0], inputs.labels.flatten())
        return (nll.view(inputs.weights.shape) * inputs.weights).sum(dim=1)

    def _select(self, head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """``(rows, length, d)`` -> ``(1, wanted, d)``."""
        if self._wanted is None:
            return None
        return (torch.index_select(arguments[0].flatten(0, 1), 0, self._wanted)[None],)
