"""The fleet's loop: whose turn it is, a step, what came of it; until everybody is finished.

While the device computes a step the host prepares the next one, for who would be in it if nobody
came or went; when somebody did, it is prepared again.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

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
        self._ahead: tuple[list[tuple[str, int]], FleetInputs] | None = None

    def run(
        self,
        finishing: Finishing,
        stop: Callable[[], bool],
        on_step: OnFleetStep | None,
    ) -> bool:
        """Go on until everybody is finished; False when ``stop`` said so before."""
        with JsonLines(self._directory.steps) as log_file:
            self._admit(finishing)
            while not self._turns.over and not stop():
                done = self._one_step(finishing)
                log_file.append(cast(Any, done))
                if on_step is not None:
                    on_step(done)
                finishing.check()
                if self.step % self._save_every == 0 and not self._turns.over:
                    self.save(finishing)
            log_file.sync()
            self.save(finishing)
        return self._turns.over

    def save(self, finishing: Finishing) -> None:
        """Write a checkpoint; what is finished is written before, and logs are on disk."""
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

    def _one_step(self, finishing: Finishing) -> FleetStepMetrics:
        started = time.perf_counter()
        wave = self._turns.wave()
        plan = [(name, self._members[name].step) for name in wave]
        inputs = self._prepared(plan)
        outcome = self._core.run(inputs)
        if self._core.device.type == "cuda":
            self._prepare_ahead(plan)
        outcome = outcome.read()
        seconds = time.perf_counter() - started
        self.step += 1
        self._turns.pass_on(wave)
        losses = self._note(plan, inputs, outcome, seconds, finishing)
        tokens = sum(len(row.ids) for name, at in plan for row in self._members[name].batch(at))
        due = [name for name in wave if name in self._turns.slots and self._members[name].due()]
        self._evaluate(due, finishing)
        for name in wave:
            member = self._members[name]
            if name in self._turns.slots and member.step == member.tenant.config.steps:
                self._leave(name, "finished", finishing)
        resident = len(self._turns.slots)
        self._admit(finishing)
        return FleetStepMetrics(
            step=self.step,
            tenants=len(wave),
            resident=resident,
            finished=len(self._members) - len(self._turns.slots) - len(self._turns.waiting),
            loss=sum(losses) / len(losses),
            tokens=tokens,
            seconds=round(seconds, 6),
            peak_bytes=peak_bytes(self._core.device),
        )

    def _note(
        self,
        plan: Sequence[tuple[str, int]],
        inputs: FleetInputs,
        outcome: Outcome,
        seconds: float,
        finishing: Finishing,
    ) -> list[float]:
        """Log the step of each tenant; those that are not finite any more leave."""
        losses = loss_by_lane(inputs, outcome.nll)
        norms, updated = outcome.norm.tolist(), outcome.updated.tolist()
        peak = peak_bytes(self._core.device)
        for name, at in plan:
            member, slot = self._members[name], self._turns.slots[name]
            loss = losses[slot]
            error = None if updated[slot] else str(Diverged(at + 1, loss))
            tokens = sum(len(row.ids) for row in member.batch(at))
            member.lines.append(
                StepMetrics(
                    step=at + 1,
                    loss=loss,
                    lr=member.rate(at),
                    grad_norm=norms[slot],
                    tokens_s=round(tokens / seconds, 1),
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

    def _prepared(self, plan: list[tuple[str, int]]) -> FleetInputs:
        if self._ahead is not None and self._ahead[0] == plan:
            inputs = self._ahead[1]
        else:
            inputs = self._prepare(plan)
        self._ahead = None
        return inputs

    def _prepare_ahead(self, plan: Sequence[tuple[str, int]]) -> None:
        """Prepare the step after ``plan``, unless somebody is finished by then."""
        steps = {name: at + 1 for name, at in plan}
        if any(self._members[name].tenant.config.steps == at for name, at in steps.items()):
            return
        following = self._turns.after(steps)
        expected = [(name, steps.get(name, self._members[name].step)) for name in following]
        self._ahead = expected, self._prepare(expected)

    def _prepare(self, plan: Sequence[tuple[str, int]]) -> FleetInputs:
        parts = [(self._turns.slots[name], self._members[name].batch(at)) for name, at in plan]
        rates = [self._members[name].rate(at) for name, at in plan]
        return self._inputs(parts, rates)

    def _inputs(
        self, parts: Sequence[tuple[int, Sequence[Row]]], rates: Sequence[float] | None
    ) -> FleetInputs:
        fixed = self._rows if self._core.fixed_shapes and rates is not None else None
        lanes = self._core.optimizer.lanes
        inputs = fleet_inputs(parts, lanes, rates=rates, fixed_rows=fixed)
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
