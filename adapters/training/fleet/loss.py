"""The loss of a fleet's step: logits a piece at a time, and their gradient while they are there.

A step of many tenants learns many tokens, and a vocabulary is large: all logits at once would
take more memory than the layers. The output embedding is frozen, so nothing but the gradient of
its input is wanted, and that is computed with the logits, before the next piece.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from shoal.adapters.training.errors import BaseRejected

# Logits held at a time, as float32: 64 MiB on a CPU, 1 GiB on a device.
CPU_LOGITS = 1 << 24
DEVICE_LOGITS = 1 << 28


class Head:
    """A decoder's output embedding.

    Attributes:
        weight: ``(vocabulary, d)``, frozen.
        bias: ``(vocabulary,)`` or None.
        softcap: ``c`` of ``c·tanh(x/c)`` on the logits, or None.
        piece: places at a time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find it.

        Raises:
            BaseRejected: it has none, or does to its logits what is not done here.
        """
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise BaseRejected(f"{type(model).__name__} has no output embedding: cannot be trained")
        config = model.config
        for name in ("logits_scaling", "logit_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise BaseRejected(f"{type(model).__name__} scales its logits ({name})")
        self.weight = linear.weight
        self.bias = linear.bias
        softcap = getattr(config, "final_logit_softcapping", None)
        self.softcap = None if softcap is None else float(softcap)
        limit = CPU_LOGITS if self.weight.device.type == "cpu" else DEVICE_LOGITS
        self.piece = max(16, limit // self.weight.shape[0])

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """``(places,)`` float32: how unlikely ``labels`` are after ``hidden (places, d)``, in nats.

        Without gradient.
        """
        parts = zip(torch.split(hidden, self.piece), torch.split(labels, self.piece), strict=True)
        return torch.cat([_nll(_log_softmax(self.logits(h)), label) for h, label in parts])

    def logits(self, hidden: Tensor) -> Tensor:
        """``(places, vocabulary)`` in the weight's dtype; float32 with a softcap."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.softcap is None:
            return logits
        return torch.tanh(logits.float() / self.softcap) * self.softcap


def weighted_nll(
    hidden: Tensor, positions: Tensor, labels: Tensor, weights: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the places' losses, and the losses.

    Args:
        hidden: ``(tokens, d)``, the decoder's output.
        positions: ``(places,)`` int64, tokens that are to predict the label. Those of weight 0 may
            repeat others.
        labels: ``(places,)`` int64.
        weights: ``(places,)`` float32.
        head: the output embedding.

    Returns:
        A scalar that can be differentiated by ``hidden``, and ``(places,)`` float32 that cannot.
    """
    arguments = (hidden, positions, labels, weights, head)
    total, nll = _WeightedNll.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, nll


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, positions: Tensor, labels: Tensor, weights: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        picked = hidden.index_select(0, positions)
        nll = torch.empty_like(weights)
        gradient = torch.empty_like(picked)
        for start in range(0, len(positions), head.piece):
            part = slice(start, start + head.piece)
            logits = head.logits(picked[part])
            logs = _log_softmax(logits)
            nll[part] = _nll(logs, labels[part])
            scale = weights[part, None]
            if head.softcap is not None:
                scale = scale * (1 - (logits / head.softcap).square_())
            # In place and rounded while it is scaled: passes over logits are what takes time here.
            slope = logs.exp_()
            slope.scatter_add_(1, labels[part, None], slope.new_full((len(slope), 1), -1.0))
            same = picked.dtype == slope.dtype
            rounded = slope if same else torch.empty_like(slope, dtype=picked.dtype)
            torch.mul(slope, scale, out=rounded)
            torch.mm(rounded, head.weight, out=gradient[part])
        ctx.save_for_backward(positions, gradient)
        ctx.shape = hidden.shape
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        positions, gradient = ctx.saved_tensors
        # Places of weight 0 add zeros to others; nothing else is added twice, so the order in
        # which a device adds does not matter.
        hidden = gradient.new_zeros(ctx.shape)
        hidden.index_add_(0, positions, gradient * scale.to(gradient.dtype))
        return hidden, None, None, None, None


def _log_softmax(logits: Tensor) -> Tensor:
    """``(places, vocabulary)`` float32."""
    return F.log_softmax(logits, dim=1, dtype=torch.float32)


def _nll(logs: Tensor, labels: Tensor) -> Tensor:
    """``(places,)`` of log-probabilities."""
    return -logs.gather(1, labels[:, None]).squeeze(1)
