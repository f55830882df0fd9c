"""The fleet's loop: whose turn it is, a step, what came of it; until everybody is finished.

A device is given the next step before the host looks at what came of the last one, unless somebody
may come or go by then.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from shoal.adapters.training.environment import peak_bytes
from shoal.adapters.training.errors import Diverged
from shoal.adapters.training.fleet.bank import Bank
from shoal.adapters.training.fleet.finishing import Finished, Finishing
from shoal.adapters.training.fleet.fleetdir import FleetDirectory
from shoal.adapters.training.fleet.inputs import FleetInputs, Row, fleet_inputs, loss_by_lane
from shoal.adapters.training.fleet.members import Member
from shoal.adapters.training.fleet.step import FleetStep, Outcome
from shoal.adapters.training.fleet.turns import Turns
from shoal.adapters.training.metrics import JsonLines, StepMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetStepMetrics:
    """One step of a fleet.

    Attributes:
        step: from 1.
        tenants: in the step.
        resident: who have a slot.
        finished: so far.
        loss: mean of the tenants' losses.
        tokens: read, padding excluded.
        seconds: of the step, evaluations and checkpoints excluded.
        peak_bytes: most memory so far; see ``environment.peak_bytes``.
    """

    step: int
    tenants: int
    resident: int
    finished: int
    loss: float
    tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way.

    Attributes:
        plan: who is in it, and how many updates each had before.
        slots: theirs.
        tokens: theirs, padding excluded.
        inputs: what it reads.
        outcome: what it will say.
    """

    plan: list[tuple[str, int]]
    slots: dict[str, int]
    tokens: dict[str, int]
    inputs: FleetInputs
    outcome: Outcome


def lag_of(device: torch.device) -> int:
    """Steps that may be under way while the host looks at the one before them."""
    return int(device.type == "cuda")


OnFleetStep = Callable[[FleetStepMetrics], None]


class FleetLoop:
    """Runs steps and decides who is in them.

    Attributes:
        step: steps made.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        turns: Turns,
        bank: Bank,
        core: FleetStep,
        directory: FleetDirectory,
        *,
        rows: int,
        save_every: int,
        fingerprint: Mapping[str, Any],
    ) -> None:
        """Everybody waits.

        Args:
            members: all tenants by reference, in their order.
            turns: of the same.
            bank, core: where their values are, and what a step computes.
            directory: of the fleet.
            rows: of a step.
            save_every: steps between checkpoints.
            fingerprint: what identifies the fleet.
        """
        self.step = 0
        self._members = members
        self._turns = turns
        self._bank = bank
        self._core = core
        self._directory = directory
        self._rows = rows
        self._save_every = save_every
        self._fingerprint = fingerprint
        self._lag = lag_of(core.device)
        self._under_way: deque[_Launched] = deque()
        self._clock = 0.0

    def run(
        self,
        finishing: Finishing,
        stop: Callable[[], bool],
        on_step: OnFleetStep | None,
    ) -> bool:
        """Go on until everybody is finished; False when ``stop`` said so before."""
        with JsonLines(self._directory.steps) as log_file:
            self._admit(finishing)
            self._clock = time.perf_counter()
            while self._under_way or not (self._turns.over or stop()):
                if not self._under_way or not (stop() or self._must_settle()):
                    self._launch()
                    continue
                done = self._settle_one(finishing)
                log_file.append(cast(Any, done))
                if on_step is not None:
                    on_step(done)
                finishing.check()
                due = self.step % self._save_every == 0 and not self._under_way
                if due and not self._turns.over:
                    self.save(finishing)
                    self._clock = time.perf_counter()
            log_file.sync()
            self.save(finishing)
        return self._turns.over

    def save(self, finishing: Finishing) -> None:
        """Write a checkpoint; what is finished, and logs up to here, are written before."""
        finished = finishing.settle()
        names = list(self._turns.order)
        for name in names:
            self._members[name].flush()
        slots = [self._turns.slots[name] for name in names]
        head = {
            "fingerprint": dict(self._fingerprint),
            "step": self.step,
            "order": names,
            "slots": self._turns.slots,
            "members": {name: self._members[name].progress() for name in names},
            "digests": {name: member.digest for name, member in self._members.items()},
            "finished": [asdict(result) for result in finished],
        }
        self._directory.save(self._bank.state(slots), head)

    def restore(self, state: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
        """Take what ``save`` wrote."""
        self.step = head["step"]
        done = [result["reference"] for result in head["finished"]]
        self._turns.restore(head["order"], head["slots"], done)
        for name in head["order"]:
            self._members[name].restore(head["members"][name])
        self._bank.load([head["slots"][name] for name in head["order"]], state)

    def _admit(self, finishing: Finishing) -> None:
        """Let in who has room; who has nothing to learn any more is finished at once."""
        came = self._turns.admit()
        for name in came:
            member = self._members[name]
            member.directory.clear()
            self._bank.begin(self._turns.slots[name], member.tenant.config.seed)
        self._evaluate([name for name in came if self._members[name].due()], finishing)

    def _launch(self) -> None:
        """Start the step of those whose turn it is."""
        wave = self._turns.wave()
        plan = [(name, self._members[name].issued) for name in wave]
        slots = {name: self._turns.slots[name] for name in wave}
        batches = {name: self._members[name].batch(at) for name, at in plan}
        inputs = self._inputs(
            [(slots[name], rows) for name, rows in batches.items()],
            [self._members[name].rate(at) for name, at in plan],
        )
        tokens = {name: sum(len(row.ids) for row in rows) for name, rows in batches.items()}
        outcome = self._core.run(inputs)
        self._under_way.append(_Launched(plan, slots, tokens, inputs, outcome))
        self._turns.pass_on(wave)
        for name in wave:
            self._members[name].issued += 1

    def _must_settle(self) -> bool:
        """Whether what is under way has to end before another step is launched."""
        if len(self._under_way) > self._lag or not self._turns.order:
            return True
        if (self.step + len(self._under_way)) % self._save_every == 0:
            return True
        last = self._under_way[-1].plan
        return any(self._members[name].matters(at + 1) for name, at in last)

    def _settle_one(self, finishing: Finishing) -> FleetStepMetrics:
        """Wait for the oldest step under way, and see what came of it."""
        launched = self._under_way.popleft()
        plan = launched.plan
        launched.outcome.wait()
        self.step += 1
        losses = self._note(launched, time.perf_counter() - self._clock, finishing)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens = sum(launched.tokens.values())
        members = [self._members[name] for name, _ in plan if name in self._turns.slots]
        if not self._under_way:
            self._evaluate([m.tenant.reference for m in members if m.due()], finishing)
            for member in members:
                name = member.tenant.reference
                if name in self._turns.slots and member.step == member.tenant.config.steps:
                    self._leave(name, "finished", finishing)
            self._admit(finishing)
            self._clock = time.perf_counter()
        return FleetStepMetrics(
            step=self.step,
            tenants=len(plan),
            resident=len(self._turns.slots),
            finished=len(self._members) - len(self._turns.slots) - len(self._turns.waiting),
            loss=sum(losses) / len(losses),
            tokens=tokens,
            seconds=round(seconds, 6),
            peak_bytes=peak_bytes(self._core.device),
        )

    def _note(self, launched: _Launched, seconds: float, finishing: Finishing) -> list[float]:
        """Log the step of each tenant; those that are not finite any more leave."""
        outcome = launched.outcome
        losses = loss_by_lane(launched.inputs, outcome.nll)
        norms, updated = outcome.norm.tolist(), outcome.updated.tolist()
        peak = peak_bytes(self._core.device)
        for name, at in launched.plan:
            member, slot = self._members[name], launched.slots[name]
            if member.fate != "running":
                continue  # it diverged in a step that this one had to follow at once
            loss = losses[slot]
            error = None if updated[slot] else str(Diverged(at + 1, loss))
            member.lines.append(
                StepMetrics(
                    step=at + 1,
                    loss=loss,
                    lr=member.rate(at),
                    grad_norm=norms[slot],
                    tokens_s=round(launched.tokens[name] / seconds, 1),
                    seconds=round(seconds, 6),
                    peak_bytes=peak,
                    error=error,
                )
            )
            member.loss = loss if math.isfinite(loss) else None
            if error is None:
                member.step = at + 1
            else:
                log.warning("tenant=%s %s", name, error)
                self._leave(name, "diverged", finishing)
        return list(losses.values())

    def _leave(self, name: str, fate: str, finishing: Finishing) -> None:
        """A tenant is finished: its slot is free, its adapter is on its way."""
        member = self._members[name]
        member.fate = fate
        slot = self._turns.leave(name)
        tenant = member.tenant
        if fate == "diverged":
            finishing.add(tenant, member.result(), member.flush)
            return
        values = self._bank.take(slot, best=tenant.config.patience is not None)

        def write() -> None:
            member.flush()
            self._bank.write(tenant.config.out, values, tenant.config)

        finishing.add(tenant, member.result(), write)

    def _inputs(
        self, parts: Sequence[tuple[int, Sequence[Row]]], rates: Sequence[float] | None
    ) -> FleetInputs:
        most = self._rows if self._core.fixed_shapes and rates is not None else None
        lanes = self._core.optimizer.lanes
        inputs = fleet_inputs(parts, lanes, rates=rates, most_rows=most)
        return inputs.pinned() if self._core.device.type == "cuda" else inputs

    def _evaluate(self, names: Sequence[str], finishing: Finishing) -> None:
        """Measure these tenants, many at a time, and let those go that get no better."""
        sums = dict.fromkeys(names, 0.0)
        for pieces in self._evaluation_steps(names):
            parts = [(self._turns.slots[name], rows) for name, rows in pieces]
            inputs = self._inputs(parts, None)
            nll = self._core.losses(inputs)
            # The weights make each lane's mean; sums can be added up over pieces.
            means = loss_by_lane(inputs, nll)
            for name, rows in pieces:
                places = sum(len(row.places) for row in rows)
                sums[name] += means[self._turns.slots[name]] * places
        for name in names:
            member = self._members[name]
            loss = sums[name] / sum(len(row.places) for row in member.evaluation)
            if member.note_evaluation(loss):
                self._bank.keep(self._turns.slots[name])
            patience = member.tenant.config.patience
            if member.best.exhausted(patience) and member.step < member.tenant.config.steps:
                self._leave(name, "patience", finishing)

    def _evaluation_steps(self, names: Sequence[str]) -> list[list[tuple[str, list[Row]]]]:
        """The rows to measure, cut into pieces of at most as many rows as a step has."""
        pieces: list[list[tuple[str, list[Row]]]] = []
        room = 0
        for name in names:
            rest = list(self._members[name].evaluation)
            while rest:
                if room == 0:
                    pieces.append([])
                    room = self._rows
                taken, rest = rest[:room], rest[room:]
                pieces[-1].append((name, taken))
                room -= len(taken)
        return pieces


def settled(results: Sequence[Mapping[str, Any]]) -> list[Finished]:
    """What a checkpoint says of those who are finished."""
    return [Finished(**result) for result in results]
