"""Scoring through the serving model: whole rows in one step, each with its adapter, logits of any
position.

Where the scheduler would sample one token a row, this looks at the distributions themselves. The
steps are made of the same rows, run by the same runner over the same bank and KV cache; who uses
it sees to it that no engine runs meanwhile. It knows token ids, not text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import UNIT_ELEMENTS, AdapterSpec, RowAdapter
from shoal.adapters.training.evaluation.source import (
    BASE,
    Continuation,
    Divergence,
    Likelihood,
)
from shoal.server.assemble import Parts
from shoal.server.engine.plan import AdapterLoad, Row, StepPlan
from shoal.server.engine.request import SamplingParams

# Elements of float32 logits that are made at once.
LOGITS_MAX = 1 << 24
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(slots=True)
class _Planned:
    """A row of the step to come, and at which positions whose tokens are wanted."""

    adapter: str
    ids: tuple[int, ...]
    wanted: list[tuple[Continuation, range]] = field(default_factory=list)


class Scorer:
    """Runs scoring steps on built parts. Made anew after an engine has run: it has used the bank.

    Args:
        elements: of an adapter, by name, in the bank.
        stage: gives the spec of an adapter by name, pinned in the host tier until ``unstage``.
    """

    def __init__(
        self,
        parts: Parts,
        elements: Callable[[str], int],
        stage: Callable[[str], AdapterSpec],
        unstage: Callable[[AdapterSpec], None],
    ) -> None:
        self._parts = parts
        self._elements = elements
        self._stage = stage
        self._unstage = unstage
        self._slots = SlotTable(parts.bank.num_units, UNIT_ELEMENTS)
        # Adapters of a step are in the bank, and pinned in the host tier, together.
        self._units_max = min(
            parts.bank.num_units,
            parts.host.capacity_bytes // (UNIT_ELEMENTS * parts.bank.dtype.itemsize),
        )

    def likelihoods(self, continuations: Iterable[Continuation]) -> Iterator[Likelihood]:
        """As ``AnswerSource.likelihoods``.

        Continuations that share everything but their last token share a row, as the choices of one
        token do.
        """
        step = _Step()
        for wanted in continuations:
            ids = (*wanted.prompt_ids, *wanted.token_ids[:-1])
            positions = range(len(wanted.prompt_ids) - 1, len(ids))
            row = self._add(step, wanted.adapter, ids)
            if row is None:
                yield from self._score(step)
                step = _Step()
                row = self._add(step, wanted.adapter, ids)
                assert row is not None, "an empty step takes any row within the limits"
            row.wanted.append((wanted, positions))
        if step.rows:
            yield from self._score(step)

    def divergences(
        self, adapters: Sequence[str], texts: Sequence[tuple[int, ...]]
    ) -> Iterator[Divergence]:
        """As ``AnswerSource.divergences``: a text's rows share steps with the base's own."""
        for key, ids in enumerate(texts):
            inputs, targets = ids[:-1], ids[1:]
            left = list(adapters)
            while left:
                step = _Step()
                self._add(step, BASE, inputs)
                taken = []
                while left and self._add(step, left[0], inputs) is not None:
                    taken.append(left.pop(0))
                assert taken, "the base's row and one more fit a step"
                yield from self._compare(step, taken, key, targets)

    def _add(self, step: "_Step", adapter: str, ids: tuple[int, ...]) -> "_Planned | None":
        """A row of the step, the one that is there or a new one; None when it has no room."""
        row = step.rows.get((adapter, ids))
        if row is not None:
            return row
        plan, config = self._parts.plan, self._parts.config
        assert len(ids) <= plan.max_model_len, "the caller knows the limits"
        blocks = -(-len(ids) // plan.block_tokens)
        units = 0
        if adapter != BASE and adapter not in step.adapters:
            units = -(-self._elements(adapter) // UNIT_ELEMENTS)
        fits = (
            len(step.rows) < config.max_num_seqs
            and step.tokens + len(ids) <= config.max_num_batched_tokens
            and step.blocks + blocks <= plan.num_blocks
            and step.units + units <= self._units_max
        )
        if not fits:
            return None
        step.tokens += len(ids)
        step.blocks += blocks
        step.units += units
        step.adapters.add(adapter)
        row = step.rows[adapter, ids] = _Planned(adapter, ids)
        return row

    def _score(self, step: "_Step") -> Iterator[Likelihood]:
        found: list[Likelihood] = []
        with torch.inference_mode():
            hidden, places = self._run(step)
            positions: list[int] = []
            targets: list[int] = []
            owners: list[Continuation] = []
            for row, start in places:
                for wanted, at in row.wanted:
                    positions += [start + index for index in at]
                    targets += wanted.token_ids
                    owners.append(wanted)
            values: list[float] = []
            for part, tokens in zip(
                self._chunks(hidden, positions), self._chunks_of(targets), strict=True
            ):
                chosen = torch.tensor(tokens, device=part.device)[:, None]
                values += F.log_softmax(part, dim=-1).gather(1, chosen)[:, 0].double().tolist()
            done = 0
            for wanted in owners:
                count = len(wanted.token_ids)
                found.append(Likelihood(wanted, sum(values[done : done + count])))
                done += count
        yield from found

    def _compare(
        self, step: "_Step", adapters: Sequence[str], key: int, targets: tuple[int, ...]
    ) -> Iterator[Divergence]:
        with torch.inference_mode():
            hidden, places = self._run(step)
            starts = {row.adapter: start for row, start in places}
            device = hidden.device
            sums = torch.zeros(len(adapters), 4, dtype=torch.float64, device=device)
            for first in range(0, len(targets), self._chunk):
                at = range(first, min(first + self._chunk, len(targets)))
                chosen = torch.tensor(targets[at.start : at.stop], device=device)[:, None]
                log_p = self._log_probabilities(hidden, starts[BASE], at)
                p = log_p.exp()
                entropy = -_dot(p, log_p)
                for index, adapter in enumerate(adapters):
                    log_q = self._log_probabilities(hidden, starts[adapter], at)
                    cross_entropy = -_dot(p, log_q)
                    kl = _dot(p, log_p - log_q)
                    nll = -log_q.gather(1, chosen).double().sum()
                    sums[index] += torch.stack((cross_entropy, entropy, kl, nll))
            values = sums.tolist()
        for adapter, numbers in zip(adapters, values, strict=True):
            yield Divergence(adapter, key, len(targets), *numbers)

    def _log_probabilities(self, hidden: Tensor, start: int, at: range) -> Tensor:
        part = hidden[start + at.start : start + at.stop]
        return F.log_softmax(self._parts.decoder.logits(part), dim=-1)

    @property
    def _chunk(self) -> int:
        """Positions whose logits are made at once."""
        return max(1, LOGITS_MAX // self._parts.decoder.config.vocab_size)

    def _chunks(self, hidden: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Logits of these tokens, some at a time."""
        for part in self._chunks_of(positions):
            at = torch.tensor(part, device=hidden.device)
            yield self._parts.decoder.logits(hidden.index_select(0, at))

    def _chunks_of(self, values: Sequence[int]) -> list[Sequence[int]]:
        size = self._chunk
        return [values[start : start + size] for start in range(0, len(values), size)]

    def _run(self, step: "_Step") -> tuple[Tensor, list[tuple[_Planned, int]]]:
        """Hidden states of all tokens, and where each row's begin."""
        # As a plan has them: one-token rows first, then by adapter.
        rows = sorted(step.rows.values(), key=lambda row: (len(row.ids) > 1, row.adapter))
        specs = {name: self._stage(name) for name in {row.adapter for row in rows} - {BASE}}
        try:
            held, loads = self._place(specs)
            plan = StepPlan(rows=self._rows(rows, held), adapter_loads=loads)
            hidden = self._parts.runner.hidden(plan)
        finally:
            for spec in specs.values():
                self._unstage(spec)
        places, start = [], 0
        for row in rows:
            places.append((row, start))
            start += len(row.ids)
        return hidden, places

    def _place(
        self, specs: dict[str, AdapterSpec]
    ) -> tuple[dict[str, RowAdapter], tuple[AdapterLoad, ...]]:
        """Find places in the bank, and what is to be copied there first."""
        held: dict[str, RowAdapter] = {}
        loads = []
        for name, spec in specs.items():
            acquired = self._slots.acquire(spec)
            if acquired is None:
                # There is room, in pieces. Side by side in an empty bank they fit.
                self._slots = SlotTable(self._parts.bank.num_units, UNIT_ELEMENTS)
                return self._place(specs)
            slot, needs_load = acquired
            held[name] = RowAdapter(spec, slot)
            if needs_load:
                loads.append(AdapterLoad(adapter=held[name]))
        for spec in specs.values():  # the step is over before anything else is placed
            self._slots.release(spec.digest)
        return held, tuple(loads)

    def _rows(self, rows: Sequence[_Planned], held: dict[str, RowAdapter]) -> tuple[Row, ...]:
        made, block = [], 0
        for lane, row in enumerate(rows):
            count = -(-len(row.ids) // self._parts.plan.block_tokens)
            made.append(
                Row(
                    request_id=str(lane),
                    token_ids=row.ids,
                    start=0,
                    block_ids=tuple(range(block, block + count)),
                    sample=False,
                    sampling=_GREEDY,
                    adapter=held.get(row.adapter),
                    lane=lane,
                )
            )
            block += count
        return tuple(made)


@dataclass(slots=True)
class _Step:
    """Rows by what tells them apart, and what they take."""

    rows: dict[tuple[str, tuple[int, ...]], _Planned] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    tokens: int = 0
    blocks: int = 0
    units: int = 0


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of products over everything; where a weight is 0 the product is 0. Float64."""
    # A probability that underflowed to 0 leaves no weight to a logarithm of -inf.
    return torch.where(weights > 0, weights * values, 0.0).sum(-1).double().sum()
