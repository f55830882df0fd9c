"""``Example``: a tokenised record, or several that share a row. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and which of them are to be learnt (same length).

    Attributes:
        input_ids: the tokens.
        supervised: whether each counts in the loss.
        starts: where records begin in it, ascending, the first at 0; more than one when packed.
    """

    input_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    starts: tuple[int, ...] = (0,)
