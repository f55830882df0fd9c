"""What the papers claim, as comparisons of two settings that the log can answer. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.adapters.training.experiments.choosing import run_of
from shoal.adapters.training.experiments.log import Log
from shoal.adapters.training.experiments.settings import Setting
from shoal.adapters.training.experiments.statistics import Spread, Verdict, spread, verdict
from shoal.adapters.training.experiments.tables import (
    ALL,
    DORA,
    LORA_RANK,
    MILORA,
    MISS_RANK,
    PISSA,
    TWO,
    VERA,
    hyperparameter_sets,
    initialisations,
    lora,
    lora_xs,
    miss,
)

Metric = Literal[
    "accuracy", "final_loss", "early_loss", "first_grad_norm", "forgetting_loss", "parameters"
]
MORE_IS_BETTER: tuple[Metric, ...] = ("accuracy", "first_grad_norm")


@dataclass(frozen=True)
class Claim:
    """``a`` is better than ``b`` by a metric, on the average over tasks.

    Attributes:
        table: under which it is reported.
        source: table or section of the paper.
        text: in words.
        metric: higher is better for `MORE_IS_BETTER`, else lower.
    """

    table: str
    source: str
    text: str
    a: Setting
    b: Setting
    metric: Metric = "accuracy"
    tasks: tuple[str, ...] = ALL


@dataclass(frozen=True)
class Answer:
    """What the log says of a claim.

    Attributes:
        verdict: see ``statistics.verdict``.
        difference: a - b, or b - a where less is better: above zero in favour of the claim.
        a, b: over seeds; None when not measured.
        tasks: those that both were measured on.
    """

    verdict: Verdict
    difference: Spread | None
    a: Spread | None
    b: Spread | None
    tasks: tuple[str, ...]


def answer(log: Log, claim: Claim, seeds: Sequence[int], steps: int) -> Answer:
    """Compare seed by seed, averaged over the tasks that both settings have for all seeds."""
    tasks = tuple(
        task
        for task in claim.tasks
        if all(
            value_of(log, setting, task, seed, steps, claim.metric) is not None
            for setting in (claim.a, claim.b)
            for seed in seeds
        )
    )
    if not tasks:
        return Answer("not measured", None, None, None, ())
    a, b = (
        [average(log, setting, tasks, seed, steps, claim.metric) for seed in seeds]
        for setting in (claim.a, claim.b)
    )
    sign = 1.0 if claim.metric in MORE_IS_BETTER else -1.0
    differences = [sign * (x - y) for x, y in zip(a, b, strict=True)]
    return Answer(verdict(differences), spread(differences), spread(a), spread(b), tasks)


def value_of(
    log: Log, setting: Setting, task: str, seed: int, steps: int, metric: str
) -> float | None:
    """One run's metric, None when it is not in the log."""
    line = run_of(log, setting, task, seed, steps)
    value = None if line is None else line.get(metric)
    return None if value is None else float(value)


def average(
    log: Log, setting: Setting, tasks: Sequence[str], seed: int, steps: int, metric: str
) -> float:
    """Over tasks, all of which are in the log."""
    values = [value_of(log, setting, task, seed, steps, metric) for task in tasks]
    return sum(value for value in values if value is not None) / len(values)


_LORA, _MISS, _XS16, _XS4 = lora(LORA_RANK), miss(MISS_RANK), lora_xs(16), lora_xs(4)
_ADAPTERS = dict(zip(("lora", "pissa", "milora"), hyperparameter_sets()[:3], strict=True))
_PISSA_SET = dict(zip(("lora", "pissa", "milora"), hyperparameter_sets()[3:], strict=True))


def _initialisation_claims() -> list[Claim]:
    claims = []
    for rank, table in ((16, "lora-xs-init"), (4, "lora-xs-init-4")):
        svd, random, svd_of_random, bottom, no_sigma = initialisations(rank)
        for source, text, other in (
            ("Table 4", "SVD of W beats random factors", random),
            ("Table 4", "SVD of W beats SVD of a random matrix", svd_of_random),
            ("Appendix H", "top singular vectors beat bottom ones", bottom),
            ("Appendix I", "with Σ beats without", no_sigma),
        ):
            text = f"{text} (r={rank})"
            claims.append(Claim(table, f"LoRA-XS, {source}", text, svd, other))
        text = f"SVD of W learns faster early than random factors (r={rank})"
        claims.append(Claim(table, "LoRA-XS, Table 16", text, svd, random, "early_loss"))
    return claims


def _hyperparameter_claims() -> list[Claim]:
    def of(text: str, a: Setting, b: Setting) -> Claim:
        return Claim("milora-sets", "MiLoRA, Table 7", text, a, b, tasks=TWO)

    better = [
        of(f"{name} does better under the LLM-Adapters set", _ADAPTERS[key], _PISSA_SET[key])
        for key, name in (("lora", "LoRA"), ("pissa", "PiSSA"), ("milora", "MiLoRA"))
    ]
    return [
        of("LLM-Adapters set: MiLoRA beats LoRA", _ADAPTERS["milora"], _ADAPTERS["lora"]),
        of("LLM-Adapters set: MiLoRA beats PiSSA", _ADAPTERS["milora"], _ADAPTERS["pissa"]),
        of("PiSSA set: PiSSA beats LoRA", _PISSA_SET["pissa"], _PISSA_SET["lora"]),
        of("PiSSA set: PiSSA beats MiLoRA", _PISSA_SET["pissa"], _PISSA_SET["milora"]),
        *better,
        *(
            Claim(
                "milora-sets",
                "MiLoRA, Table 6",
                f"LLM-Adapters set: MiLoRA forgets less than {name}",
                _ADAPTERS["milora"],
                _ADAPTERS[key],
                "forgetting_loss",
                TWO,
            )
            for key, name in (("lora", "LoRA"), ("pissa", "PiSSA"))
        ),
    ]


CLAIMS: tuple[Claim, ...] = (
    Claim("miss", "MiSS, Table 5", "MiSS is more accurate than LoRA", _MISS, _LORA),
    Claim("miss", "MiSS, Table 5", "MiSS is more accurate than PiSSA", _MISS, PISSA),
    Claim("miss", "MiSS, Table 5", "MiSS is more accurate than DoRA", _MISS, DORA),
    Claim("miss", "MiSS, Table 5", "PiSSA is more accurate than LoRA", PISSA, _LORA),
    Claim("miss", "MiSS, Table 5", "DoRA is more accurate than LoRA", DORA, _LORA),
    Claim(
        "miss", "MiSS, Figure 5", "MiSS's early loss is below LoRA's", _MISS, _LORA, "early_loss"
    ),
    Claim(
        "miss",
        "MiSS, Figure 1",
        "MiSS's first gradient is larger than LoRA's",
        _MISS,
        _LORA,
        "first_grad_norm",
    ),
    Claim(
        "lora-xs",
        "LoRA-XS, Tables 1-3",
        "LoRA-XS r=64 (0.9 M values) is more accurate than LoRA r=8 (2.4 M)",
        lora_xs(64),
        lora(8),
    ),
    Claim(
        "lora-xs",
        "LoRA-XS, Tables 1-3",
        "LoRA-XS r=64 (0.9 M values) is more accurate than LoRA r=2 (0.6 M)",
        lora_xs(64),
        lora(2),
    ),
    Claim("lora-xs", "LoRA-XS, Table 1", "LoRA-XS r=16 beats VeRA", _XS16, VERA),
    Claim("lora-xs", "LoRA-XS, Tables 1-3", "r=16 beats r=4", _XS16, _XS4),
    Claim("lora-xs", "LoRA-XS, Tables 1-3", "r=64 beats r=16", lora_xs(64), _XS16),
    Claim("milora", "MiLoRA, Table 2", "MiLoRA is more accurate than LoRA", MILORA, _LORA),
    Claim("milora", "MiLoRA, Table 2", "MiLoRA is more accurate than PiSSA", MILORA, PISSA),
    Claim(
        "milora", "MiLoRA, Table 6", "MiLoRA forgets less than LoRA", MILORA, _LORA,
        "forgetting_loss",
    ),
    Claim(
        "milora", "MiLoRA, Table 6", "MiLoRA forgets less than PiSSA", MILORA, PISSA,
        "forgetting_loss",
    ),
    Claim(
        "milora", "MiLoRA, Table 6", "LoRA forgets less than PiSSA", _LORA, PISSA,
        "forgetting_loss",
    ),
    *_hyperparameter_claims(),
    *_initialisation_claims(),
    *(
        Claim(
            "miss-rank", "MiSS, Table 7", f"r={high} beats r={low}", miss(high), miss(low),
            tasks=TWO,
        )
        for low, high in ((16, 32), (32, 64), (64, 128), (16, 128))
    ),
)  # fmt: skip
