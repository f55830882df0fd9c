"""Early stopping: remembers the best evaluation, and says when there were too many worse ones.

Integers and floats; the trainer keeps the values that belong to the best evaluation.
"""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class BestSoFar:
    """One lane's evaluations.

    Attributes:
        step: updates before the best evaluation; -1 before the first.
        loss: its loss.
        worse: evaluations since, none of them better.
    """

    step: int = -1
    loss: float = math.inf
    worse: int = 0

    def offer(self, step: int, loss: float) -> bool:
        """Take note of an evaluation; True when it is the best so far.

        A loss that is not a number is never the best.
        """
        if loss < self.loss:
            self.step, self.loss, self.worse = step, loss, 0
            return True
        self.worse += 1
        return False

    def exhausted(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations in a row were no better; never without a patience."""
        return patience is not None and self.worse >= patience
