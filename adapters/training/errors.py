"""What can stop a training run, as typed errors whose text can be shown unchanged.

::

    TrainingError
    ├── OptionRejected      a training option breaks a rule
    ├── BaseRejected        the base model cannot be trained on
    ├── DataRejected        a line of the data breaks a rule
    ├── RunDirectoryError   the output directory is in use, or holds nothing to resume
    ├── ResumeMismatch      the checkpoint belongs to a different run
    └── Diverged            the loss is no longer a finite number
"""

import math
from collections.abc import Sequence
from pathlib import Path


class TrainingError(Exception):
    """Base of every error that the user of the trainer can mend."""


class OptionRejected(TrainingError):
    """A training option breaks a rule.

    Attributes:
        option: the option's name, as on the command line without the dashes.
    """

    def __init__(self, option: str, value: object, rule: str) -> None:
        super().__init__(f"{option} is {value}: {rule}")
        self.option = option


class BaseRejected(TrainingError):
    """The base model cannot be trained on."""


class DataRejected(TrainingError):
    """Records cannot be used.

    Attributes:
        path: the data's file or task.
        line: 1-based number of the first such record, or None when the whole file is at fault.
        rule: what was expected of it.
        others: number and rule of further records.
        unlisted: how many more there are.
        place: what the numbers count: ``line``, ``row`` or ``item``.
    """

    def __init__(
        self,
        path: Path,
        line: int | None,
        rule: str,
        others: Sequence[tuple[int, str]] = (),
        unlisted: int = 0,
        place: str = "line",
    ) -> None:
        first = f"{path}{'' if line is None else f', {place} {line}'}: {rule}"
        text = [first, *(f"  {place} {number}: {other}" for number, other in others)]
        if unlisted:
            text.append(f"  and {unlisted} more")
        super().__init__("\n".join(text))
        self.path = path
        self.line = line
        self.rule = rule
        self.others = tuple(others)
        self.unlisted = unlisted
        self.place = place


class RunDirectoryError(TrainingError):
    """The output directory is not what the options say it is."""


class ResumeMismatch(TrainingError):
    """The checkpoint was written by a run with other options, data or base."""


class Diverged(TrainingError):
    """The loss, or its gradient, became infinite or not a number."""

    def __init__(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            what = f"the gradient at step {step} is not finite: it must be"
        else:
            what = f"the loss at step {step} is {loss}: it must stay finite"
        super().__init__(f"{what}; start again with a lower lr, or other data")
        self.step = step
