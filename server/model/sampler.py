"""From logits to token ids: penalties, filters, seeded draws, log-probabilities.

Vectorised over rows; rows that ask for nothing special take a plain argmax. It decides nothing
about stopping (the scheduler does) and knows nothing of text.

A draw is an inverse-CDF lookup with one uniform number per row. For a seeded request that number
is a hash of its seed and of how many tokens it has produced, so its text does not depend on what
else is in the batch, on preemption, or on the device's random generator.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams, TokenLogprobs

# Below this temperature the division loses all precision; the draw is the argmax anyway.
TEMPERATURE_MIN = 1e-5


@dataclass(frozen=True, slots=True)
class Samples:
    """Outcome for each row, in row order.

    Attributes:
        token_ids: the chosen token; meaningless where ``finite`` is false.
        finite: false where the logits held a NaN or no finite value.
        logprobs: None for rows that did not ask.
    """

    token_ids: list[int]
    finite: list[bool]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Chooses one token per row.

    Args:
        entropy: source of the uniform numbers of unseeded requests.
    """

    def __init__(self, entropy: random.Random | None = None) -> None:
        self._entropy = entropy or random.SystemRandom()

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> Samples:
        """Choose a token for each row.

        Args:
            logits: ``(rows, vocab)`` float32; not modified.
            rows: the plan's rows with ``sample`` set, in the order of ``logits``.
        """
        adjusted = self._adjust(logits, rows)
        best, chosen = adjusted.max(dim=-1)
        finite = torch.isfinite(best)
        drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > TEMPERATURE_MIN]
        # Filters need sorted probabilities, and one uniform number means another token in sorted
        # order: a row must take the same path whatever its neighbours ask for.
        for part in (
            [i for i in drawn if _is_filtered(rows[i].sampling)],
            [i for i in drawn if not _is_filtered(rows[i].sampling)],
        ):
            if not part:
                continue
            # A NaN row would make the whole cumulative sum meaningless; it is reported instead.
            subset = _select(adjusted, part).nan_to_num(nan=0.0)
            picks = _draw(
                subset,
                [rows[i].sampling for i in part],
                [self._uniform(rows[i]) for i in part],
            )
            chosen = chosen.index_copy(0, torch.tensor(part, device=chosen.device), picks)
        return Samples(
            token_ids=chosen.tolist(),
            finite=finite.tolist(),
            logprobs=_logprobs(logits, chosen, rows),
        )

    def _uniform(self, row: Row) -> float:
        if row.sampling.seed is None:
            return self._entropy.random()
        key = f"{row.sampling.seed}/{row.output_tokens}".encode()
        # 53 bits: what a float64 holds exactly, so that the number stays below 1.
        return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 11) / 2**53

    def _adjust(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Penalties, biases and suppressed stop tokens; a copy only if a row asks for any."""
        needy = [i for i, row in enumerate(rows) if _is_adjusted(row)]
        if not needy:
            return logits
        out = logits.clone()
        for i in needy:
            self._adjust_row(out[i], rows[i])
        return out

    def _adjust_row(self, logits: Tensor, row: Row) -> None:
        sampling = row.sampling
        if row.history_ids:
            _penalise(logits, row)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            logits[list(ids)] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
        if row.suppressed_ids:
            logits[list(row.suppressed_ids)] = -torch.inf


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _is_adjusted(row: Row) -> bool:
    return bool(row.history_ids or row.sampling.logit_bias or row.suppressed_ids)


def _penalise(logits: Tensor, row: Row) -> None:
    """Repetition (prompt and output; Hugging Face) and frequency/presence (output; OpenAI)."""
    sampling = row.sampling
    history = torch.tensor(row.history_ids, device=logits.device)
    if sampling.repetition_penalty != 1.0:
        seen = torch.unique(history)
        score = logits[seen]
        logits[seen] = torch.where(
            score > 0, score / sampling.repetition_penalty, score * sampling.repetition_penalty
        )
    if sampling.frequency_penalty or sampling.presence_penalty:
        tokens, counts = torch.unique(history[row.prompt_tokens :], return_counts=True)
        logits[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One draw per row after temperature, top-k, top-p and min-p; ``(rows,)`` int64.

    Either all of ``params`` have a filter or none has.
    """
    device = logits.device

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).unsqueeze(1)

    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits / column([p.temperature for p in params]), dim=-1)
    u = torch.tensor(uniforms, dtype=torch.float64, device=device).unsqueeze(1)
    if not _is_filtered(params[0]):
        return _inverse_cdf(probs, u)
    vocab = probs.shape[1]
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=device)
    keep = rank < column([min(p.top_k or vocab, vocab) for p in params])
    # top-p works on what top-k left, like Hugging Face; the token that crosses p is kept.
    kept = probs * keep
    mass = kept.cumsum(dim=-1) / kept.sum(dim=-1, keepdim=True)
    keep &= (mass - kept / kept.sum(dim=-1, keepdim=True)) < column([p.top_p for p in params])
    keep &= probs >= column([p.min_p for p in params]) * probs[:, :1]
    keep[:, 0] = True
    return order.gather(1, _inverse_cdf(probs * keep, u).unsqueeze(1)).squeeze(1)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Index of the first entry whose cumulative weight exceeds ``u`` of the total.

    float64, because 50,000 float32 additions would lose the tail.
    """
    cumulative = weights.to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the entry found has a weight above zero.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _logprobs(logits: Tensor, chosen: Tensor, rows: Sequence[Row]) -> list[TokenLogprobs | None]:
    out: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asked:
        return out
    logprobs = torch.log_softmax(_select(logits, asked), dim=-1)
    picked = logprobs.gather(1, chosen[asked].unsqueeze(1)).squeeze(1).tolist()
    widest = max(rows[i].sampling.logprobs or 0 for i in asked)
    values, ids = (part.tolist() for part in logprobs.topk(min(widest, logprobs.shape[1])))
    for at, i in enumerate(asked):
        count = rows[i].sampling.logprobs or 0
        top = tuple(zip(ids[at][:count], values[at][:count], strict=True))
        out[i] = TokenLogprobs(logprob=picked[at], top=top)
    return out


def _select(rows: Tensor, indices: list[int]) -> Tensor:
    """``rows[indices]`` without a copy when that is everything."""
    return rows if len(indices) == rows.shape[0] else rows[indices]
