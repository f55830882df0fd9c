"""``SOURCE[:key=value,…]``: how a task is named on the command line."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shoal.adapters.training.errors import OptionRejected


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A source of items and what was said of it.

    Attributes:
        source: a file's path, ``reasoning-gym:NAME``, or ``base``.
        options: as written.
    """

    source: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, written: str) -> "TaskSpec":
        """Split ``written`` at the colon before its options.

        Raises:
            OptionRejected: what is behind the last colon is not a list of ``key=value``.
        """
        head, colon, tail = written.rpartition(":")
        if not colon or "=" not in tail or Path(written).exists():
            return cls(written)
        options: dict[str, str] = {}
        for part in filter(None, tail.split(",")):
            key, equals, value = part.partition("=")
            if not (equals and key.isidentifier() and value) or key in options:
                rule = f"has the option {part!r}; expected key=value, each key once"
                raise OptionRejected("tasks", written, rule)
            options[key] = value
        return cls(head, options)

    def __str__(self) -> str:
        said = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.source}:{said}" if said else self.source

    def allow(self, names: Collection[str]) -> None:
        """Refuse options that are not among ``names``, or OptionRejected."""
        for name in self.options:
            if name not in names:
                self._refuse(f"has no option {name!r}; there are {', '.join(names)}")

    def forbid(self, names: Collection[str], why: str) -> None:
        """Refuse options that are among ``names``, or OptionRejected."""
        for name in self.options:
            if name in names:
                self._refuse(f"option {name!r} {why}")

    def text(self, name: str) -> str | None:
        """An option as it was written, or None."""
        return self.options.get(name)

    def integer(self, name: str, at_least: int = 1) -> int | None:
        """An option that must be a number of at least this, or None. OptionRejected."""
        text = self.options.get(name)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < at_least:
            self._refuse(f"option {name!r} must be a whole number of at least {at_least}")
        return int(text)

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        """An option that must be one of these, or None. OptionRejected."""
        text = self.options.get(name)
        if text is not None and text not in choices:
            self._refuse(f"option {name!r} must be one of {', '.join(choices)}")
        return text

    def _refuse(self, rule: str) -> None:
        raise OptionRejected("tasks", self, rule)
