"""What the tables train and what that may cost, before anything is run. No torch."""

from collections.abc import Iterable

from shoal.adapters.training.experiments.settings import (
    SEEDS,
    STEPS,
    Group,
    sweep_of,
)
from shoal.adapters.training.experiments.tables import Table

# Tokens of a row as padded for recorded steps, by task (SmolLM2's tokens, multiples of 64).
PADDED = {"words": 128, "strings": 64, "lists": 192, "mixed": 128}
# Measured on an H100 with a 135M base in bfloat16: padded tokens of a step in one second, LoRA's
# and PiSSA's (DoRA: 130,000); seconds around a group's steps (loading, tokenising, recording,
# writing) and of the steps themselves that their size does not change; seconds a score.
TOKENS_S, AROUND_S, SCORE_S = 235_000, 4.5, 1.3


def plan(tables: Iterable[Table], steps: int = STEPS) -> str:
    """A Markdown table: groups and runs that each table adds to those before it, and minutes."""
    seen: set[str] = set()
    lines = [
        "| table | groups | runs | tokens (millions) | minutes, foreseen |",
        "|---|---|---|---|---|",
    ]
    sums = [0.0] * 4
    for table in tables:
        new = [group for group in groups_of(table, steps) if not seen.issuperset(group.runs)]
        for group in new:
            seen.update(group.runs)
        runs = sum(len(group.lanes) for group in new)
        scored = sum(len(group.lanes) for group in new if len({lr for _, lr in group.lanes}) == 1)
        tokens = sum(tokens_of(group) for group in new)
        minutes = (tokens / TOKENS_S + AROUND_S * len(new) + SCORE_S * scored) / 60
        row = (len(new), runs, tokens / 1e6, minutes)
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        lines.append(_row(f"`{table.name}`", row))
    return "\n".join([*lines, _row("all", (int(sums[0]), int(sums[1]), sums[2], sums[3]))])


def groups_of(table: Table, steps: int = STEPS) -> list[Group]:
    """The groups of a table; a swept learning rate is not known yet and stands as 0."""
    groups: list[Group] = []
    for setting, tasks in table.rows:
        if setting.lr is None:
            groups.append(sweep_of(setting, steps))
        lanes = tuple((seed, setting.lr or 0.0) for seed in SEEDS)
        groups += [Group(setting, task, lanes, steps) for task in tasks]
    return groups


def tokens_of(group: Group) -> int:
    """Padded tokens that a group is trained on, all of its lanes together."""
    rows = len(group.lanes) * group.setting.records
    return group.steps * rows * PADDED[group.task]


def _row(name: str, values: tuple[int, int, float, float]) -> str:
    groups, runs, tokens, minutes = values
    return f"| {name} | {groups} | {runs} | {tokens:.0f} | {minutes:.0f} |"
