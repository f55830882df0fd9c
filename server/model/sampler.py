"""From logits to token ids: penalties, seeded draws, log-probabilities.

The filters and the draw are ``shoal.kernels.sample_tokens``, the same rules on every device; this
adds what depends on a request's own tokens. It decides nothing about stopping (the scheduler
does) and knows nothing of text.

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

from shoal.kernels.sample_tokens.kernel import sample_tokens
from shoal.kernels.sample_tokens.reference import TEMPERATURE_MIN as TEMPERATURE_MIN
from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Samples:
    """Outcome for each row, in row order.

    Attributes:
        token_ids: the chosen token; meaningless where ``finite`` is false.
        finite: false where the logits held a NaN or +inf, or no finite value.
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
        asked = [row.sampling for row in rows]
        vocab, device = logits.shape[1], logits.device

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        chosen = sample_tokens(
            adjusted,
            temperature=column([s.temperature for s in asked]),
            top_k=column([min(s.top_k, vocab) for s in asked], torch.int32),
            top_p=column([s.top_p for s in asked]),
            min_p=column([s.min_p for s in asked]),
            uniform=column([uniform_of(row, self._entropy) for row in rows], torch.float64),
            greedy_only=not any(_is_drawn(s) for s in asked),
        )
        token_ids = chosen.tolist()
        return Samples(
            token_ids=token_ids,
            finite=[token >= 0 for token in token_ids],
            logprobs=_logprobs(logits, chosen.clamp(min=0), rows),
        )

    def rehearse(self, logits: Tensor) -> None:
        """Launch what ``sample`` may launch for such logits ``(rows, vocab)``; draws nothing."""
        for temperature in (0.0, 1.0):
            # No log-probabilities: what is chosen while nothing is launched need not be a token.
            sampling = SamplingParams(max_tokens=1, temperature=temperature, seed=0)
            row = Row("", (), 0, (), sample=True, sampling=sampling)
            self.sample(logits, [row] * len(logits))

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
        if row.history_ids and _has_penalties(sampling):
            _penalise(logits, row)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            logits[list(ids)] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
        if row.suppressed_ids:
            logits[list(row.suppressed_ids)] = -torch.inf


def uniform_of(row: Row, entropy: random.Random) -> float:
    """The number in 0 … 1 (excluded) that decides this row's draw; 0 for a greedy row.

    Args:
        entropy: where it comes from when the request has no seed.
    """
    if not _is_drawn(row.sampling):
        return 0.0
    if row.sampling.seed is None:
        return entropy.random()
    key = f"{row.sampling.seed}/{row.output_tokens}".encode()
    # 53 bits: what a float64 holds exactly, so that the number stays below 1.
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 11) / 2**53


def needs_host(row: Row) -> bool:
    """Whether this row asks for more than ``sample_tokens`` does, and so needs a ``Sampler``."""
    sampling = row.sampling
    return bool(
        row.suppressed_ids
        or sampling.logit_bias
        or sampling.logprobs is not None
        or _has_penalties(sampling)
    )


def _is_drawn(sampling: SamplingParams) -> bool:
    return sampling.temperature > TEMPERATURE_MIN


def _has_penalties(sampling: SamplingParams) -> bool:
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty
        or sampling.presence_penalty
    )


def _is_adjusted(row: Row) -> bool:
    return bool(row.suppressed_ids or row.sampling.logit_bias or _has_penalties(row.sampling))


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
