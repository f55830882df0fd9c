"""The tables that are measured again, and what each of them trains. No torch.

Settings stand in the order in which they are run: each is swept and then trained on every task,
so that a table cut off by its budget has complete rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.adapters.training.experiments.settings import Setting

ALL = ("words", "lists", "strings", "mixed")
TWO = ("words", "lists")

# The papers' ratio of ranks, 36 : 64, at which MiSS has fewer values than LoRA.
LORA_RANK, MISS_RANK = 9, 16


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: which tables of which paper.
        rows: settings and the tasks each is trained on.
        about: how it differs from the paper's.
    """

    name: str
    title: str
    rows: tuple[tuple[Setting, tuple[str, ...]], ...]
    about: str = ""


def lora(rank: int) -> Setting:
    """LoRA with alpha = 2r, as the papers' baselines have it."""
    return Setting(f"LoRA r={rank}", "lora", {"rank": rank, "alpha": 2.0 * rank})


def lora_xs(rank: int, label: str = "", **options: object) -> Setting:
    """LoRA-XS with alpha = r; singular vectors of W with Σ unless options say otherwise."""
    return Setting(f"LoRA-XS r={rank}{label}", "lora-xs", {"rank": rank, **options})


def plain(label: str, method: str, rank: int = LORA_RANK, **options: object) -> Setting:
    """A method with alpha = r, and its own defaults."""
    return Setting(f"{label} r={rank}", method, {"rank": rank, **options})


def miss(rank: int) -> Setting:
    """MiSS in its efficient form."""
    return Setting(f"MiSS r={rank}", "miss", {"rank": rank})


VERA = plain("VeRA", "vera", 256)
DORA = plain("DoRA", "dora", LORA_RANK, alpha=2.0 * LORA_RANK)
PISSA = plain("PiSSA", "pissa")
MILORA = plain("MiLoRA", "milora")


def initialisations(rank: int) -> tuple[Setting, ...]:
    """LoRA-XS's ablations of how the frozen factors are made."""
    return (
        lora_xs(rank),
        lora_xs(rank, " random", init="random"),
        lora_xs(rank, " SVD of random", init="svd-of-random"),
        lora_xs(rank, " bottom", vectors="bottom"),
        lora_xs(rank, " without Σ", no_sigma=True),
    )


# MiLoRA's two sets of hyperparameters (its Tables 8 and 9). Dropout (0.05 in the first) is not
# offered by this trainer and is left out.
ADAPTERS_SET = {
    "rank": 64,
    "targets": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "schedule": "linear",
    "warmup": 100 / 300,
    "batch_size": 16,
}
# Batches of 128, in parts that fit beside those of other lanes.
PISSA_SET = {"rank": 64, "schedule": "cosine", "warmup": 0.03, "batch_size": 32, "accumulate": 4}


def hyperparameter_sets() -> tuple[Setting, ...]:
    """LoRA, PiSSA and MiLoRA under both sets; learning rates are the papers'."""
    rows = []
    for name, shared, lr, lora_alpha in (
        ("LLM-Adapters", ADAPTERS_SET, 3e-4, 128.0),
        ("PiSSA", PISSA_SET, 2e-5, 64.0),
    ):
        for label, method in (("LoRA", "lora"), ("PiSSA", "pissa"), ("MiLoRA", "milora")):
            alpha = lora_alpha if method == "lora" else 64.0
            options = {**shared, "alpha": alpha}
            rows.append(Setting(f"{label}, {name} set", method, options, lr))
    return tuple(rows)


def _on(tasks: tuple[str, ...], *settings: Setting) -> tuple[tuple[Setting, tuple[str, ...]], ...]:
    return tuple((setting, tasks) for setting in settings)


TABLES: Mapping[str, Table] = {
    table.name: table
    for table in (
        Table(
            "miss",
            "MiSS, Table 5: MiSS against LoRA, DoRA and PiSSA",
            _on(ALL, lora(LORA_RANK), miss(MISS_RANK), PISSA, DORA),
            "ranks 9 and 16 instead of 36 and 64 (the same ratio); learning rate swept instead of "
            "2e-5 for all",
        ),
        Table(
            "lora-xs",
            "LoRA-XS, Tables 1-3: accuracy against trained values",
            _on(
                ALL,
                lora(8),
                lora_xs(64),
                lora_xs(16),
                lora_xs(4),
                lora_xs(32),
                lora_xs(8),
                lora(2),
                VERA,
                lora(32),
            ),
            "no full fine-tuning",
        ),
        Table(
            "milora",
            "MiLoRA, Tables 2 and 6: against LoRA and PiSSA, and what is forgotten",
            _on(ALL, lora(LORA_RANK), PISSA, MILORA),
            "learning rate swept for each; forgetting on prose instead of WikiText-103",
        ),
        Table(
            "lora-xs-init",
            "LoRA-XS, Table 4 and Appendices G, H, I: what the frozen factors are made of",
            _on(ALL, *initialisations(16)),
            "learning rate swept for each",
        ),
        Table(
            "miss-rank",
            "MiSS, Table 7: rank",
            _on(TWO, *(miss(rank) for rank in (16, 32, 64, 128))),
            "learning rate swept for each rank",
        ),
        Table(
            "miss-methods",
            "MiSS, Table 8: other methods on one arithmetic task; time and memory are in `costs`",
            _on(
                ("words",),
                lora(LORA_RANK),
                miss(MISS_RANK),
                plain("rsLoRA", "rslora", LORA_RANK, alpha=2.0 * LORA_RANK),
                DORA,
                plain("AdaLoRA", "adalora"),
                VERA,
                plain("LoRA+", "lora-plus", LORA_RANK, alpha=2.0 * LORA_RANK),
                PISSA,
                MILORA,
                lora_xs(16),
                Setting("SVF", "svf"),
                Setting("SVFT", "svft"),
                Setting("MiSS r=16, outputs shared", "miss", {"rank": 16, "shard": "output"}),
            ),
            "learning rate swept for each",
        ),
        Table(
            "milora-sets",
            "MiLoRA, Table 7: under the hyperparameters of both papers",
            (*_on(TWO, *hyperparameter_sets()[:3]), *_on(("words",), *hyperparameter_sets()[3:])),
            "rank 64 in both; 300 updates in both, so that the PiSSA set (batches of 128) sees "
            "eight times the records; no dropout; the PiSSA set on one task",
        ),
        Table(
            "lora-xs-init-4",
            "LoRA-XS, the same at rank 4, which is the paper's",
            _on(ALL, *initialisations(4)),
            "learning rate swept for each",
        ),
    )
}
