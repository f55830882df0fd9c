"""What ``sample_tokens`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor

# At or below this temperature the division loses all precision; the draw is the argmax anyway.
TEMPERATURE_MIN = 1e-5


def sample_tokens_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scale: Tensor | None = None,
    softcap: float | None = None,
    greedy_only: bool = False,
) -> Tensor:
    """See ``shoal.kernels.sample_tokens.kernel.sample_tokens``; float64 inside, any device.

    Every row is computed from itself alone, whatever its neighbours ask for.
    """
    best, token = logits.max(dim=-1)
    usable = torch.isfinite(best)
    if scale is not None:
        usable &= (scale > 0) & torch.isfinite(scale)
    token = torch.where(usable, token, -1)
    if greedy_only:
        return token
    drawn = (usable & (temperature > TEMPERATURE_MIN)).nonzero().squeeze(1)
    if drawn.numel() == 0:
        return token
    x = logits[drawn]
    weights = _weights(x, temperature[drawn], None if scale is None else scale[drawn], softcap)
    k, p, m = top_k[drawn], top_p[drawn], min_p[drawn]
    filtered = (((k > 0) & (k < x.shape[1])) | (p < 1) | (m > 0)).nonzero().squeeze(1)
    if filtered.numel() > 0:
        keep = _kept(x[filtered], weights[filtered], k[filtered], p[filtered], m[filtered])
        weights[filtered] *= keep
    return token.index_copy(0, drawn, _inverse_cdf(weights, uniform[drawn].unsqueeze(1)))


def _weights(x: Tensor, temperature: Tensor, scale: Tensor | None, softcap: float | None) -> Tensor:
    """Probabilities relative to the most probable token's, float64 ``(rows, vocab)``."""
    y = x.double()
    if scale is not None:
        y = y * scale.double().unsqueeze(1)
    if softcap is not None:
        y = torch.where(y == -torch.inf, y, softcap * torch.tanh(y / softcap))
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    return torch.exp((y - y.amax(dim=1, keepdim=True)) / temperature.double().unsqueeze(1))


def _kept(x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters leave, bool ``(rows, vocab)``."""
    vocab = x.shape[1]
    order = x.sort(dim=-1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    limit = torch.where(top_k > 0, top_k, vocab).unsqueeze(1)
    inside = torch.arange(vocab, device=x.device) < limit
    # top-p works on what top-k left, like Hugging Face; the token that crosses p is kept.
    mass = ranked * inside
    before = mass.cumsum(dim=1) - mass
    p = top_p.double().unsqueeze(1)
    inside &= (before < p * mass.sum(dim=1, keepdim=True)) | (p >= 1)
    inside &= ranked >= min_p.double().unsqueeze(1) * ranked[:, :1]
    inside[:, 0] = True
    return torch.empty_like(inside).scatter_(1, order, inside)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index of the first entry with a weight whose cumulative weight exceeds ``u`` of the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that there is such an entry.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    # Not a binary search: on a GPU a cumulative sum need not be monotone to the last bit.
    return ((cumulative > target) & (weights > 0)).to(torch.uint8).argmax(dim=-1)
