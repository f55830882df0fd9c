"""The README's table of adapter families, from the code: ``python -m shoal.adapters.family_table``.

Every format of the registry has a row, and so has every kind of adapter that people ask for and
that is refused. What an adapter takes is what packing an adapter of that kind takes, worked out on
shapes alone; a test compares the README with this.

The bound is the time that reading takes at what one H100 copies: an adapter's own record, for every
row, and in brackets what belongs to the base and is read once a step for all such rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.adapters.families.costs import adapter_cost
from shoal.adapters.packing import make_spec
from shoal.adapters.spec import BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights, Correction, CorrectionMethod

HIDDEN, INNER, KV = 4096, 14336, 1024
LLAMA_8B = BaseShape(
    name="Llama-3.1-8B",
    digest="",
    num_layers=32,
    dims={
        "q_proj": Dims(HIDDEN, HIDDEN),
        "k_proj": Dims(KV, HIDDEN),
        "v_proj": Dims(KV, HIDDEN),
        "o_proj": Dims(HIDDEN, HIDDEN),
        "gate_proj": Dims(INNER, HIDDEN),
        "up_proj": Dims(INNER, HIDDEN),
        "down_proj": Dims(HIDDEN, INNER),
    },
)
RANK = 16
DTYPE = torch.bfloat16
# Of one H100: a device copy, read and written. What must be read cannot be read faster.
BYTES_PER_SECOND = 3.03e12

# An adapter on every linear of a base, on the meta device: shapes and no memory.
Example = Callable[[BaseShape], AdapterWeights]


@dataclass(frozen=True, slots=True)
class Served:
    """A row of what is served.

    Attributes:
        name: for people; what it is called and where it comes from.
        formats: those of the registry that read it.
        how: the family, and what else is applied.
        example: what is packed for it.
        methods: what ``shoal train --method`` calls it; none where it is not trained here.
        test: where its agreement with its origin is tested.
    """

    name: str
    formats: tuple[str, ...]
    how: str
    example: Example
    test: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A row of what is not served.

    Attributes:
        name: for people.
        config: fields that make it that, over those of a plain adapter.
        kind: a tensor of it, as ``<module>.<kind>``.
        reason: a part of what the refusal says.
        advice: what to do instead.
    """

    name: str
    config: dict[str, object]
    kind: str
    reason: str
    advice: str


def _meta(*size: int) -> Tensor:
    return torch.empty(size, device="meta")


def _all(
    base: BaseShape, parts: Callable[[Dims], tuple[Tensor, ...]]
) -> dict[Target, tuple[Tensor, ...]]:
    return {target: parts(base.dims[target.module]) for target in base.targets()}


def core(base: BaseShape) -> AdapterWeights:
    """``R (r, r)`` on a shared basis."""
    tensors = _all(base, lambda dims: (_meta(RANK, RANK),))
    return AdapterWeights("", "core", tensors, dict.fromkeys(tensors, 1.0), "basis")


def fold(base: BaseShape) -> AdapterWeights:
    """``D (r, d_out)``."""
    tensors = _all(base, lambda dims: (_meta(RANK, dims.d_out),))
    return AdapterWeights("", "fold", tensors, dict.fromkeys(tensors, 1.0))


def lora(rank: int = RANK) -> Example:
    """``A`` and ``B`` of that rank."""

    def example(base: BaseShape) -> AdapterWeights:
        tensors = _all(base, lambda dims: (_meta(rank, dims.d_in), _meta(dims.d_out, rank)))
        return AdapterWeights("", "lora", tensors, dict.fromkeys(tensors, 1.0))

    return example


def dora(base: BaseShape) -> AdapterWeights:
    """LoRA, and a factor for every output."""
    plain = lora()(base)
    row_scales = {target: _meta(base.dims[target.module].d_out) for target in plain.tensors}
    return AdapterWeights("", "lora", plain.tensors, plain.scales, row_scales=row_scales)


def corrected(method: CorrectionMethod) -> Example:
    """LoRA, and what was taken out of the base."""

    def example(base: BaseShape) -> AdapterWeights:
        plain = lora()(base)
        ranks = dict.fromkeys(plain.tensors, RANK)
        removed = Correction(method, "basis", ranks, plain.scales)
        return AdapterWeights("", "lora", plain.tensors, plain.scales, correction=removed)

    return example


def spectral(entries: Callable[[int], int]) -> Example:
    """As many entries between the singular vectors as a function of their number says."""

    def example(base: BaseShape) -> AdapterWeights:
        tensors = _all(base, lambda dims: (_meta(entries(min(dims))),) * 3)
        return AdapterWeights("", "spectral", tensors, dict.fromkeys(tensors, 1.0), "svd")

    return example


ROWS: tuple[Served, ...] = (
    Served(
        "LoRA-XS: compact (our trainer's), official in every key spelling",
        ("lora_xs",),
        "`core`: `R` on a shared basis",
        core,
        "tests/adapters/test_format_lora_xs.py",
        methods=("lora-xs",),
    ),
    Served("TinyLoRA (PEFT)", ("tinylora",), "`core`", core, "tests/adapters/test_peft_parity.py"),
    Served(
        "LoRA-XS and TinyLoRA whose `A ≠ BᵀW` (LoRA-SB and others), or that find no room for "
        "their basis",
        ("lora_xs", "tinylora"),
        "`lora`, from their own factors",
        lora(),
        "tests/adapters/test_format_lora_xs.py",
    ),
    Served(
        "MiSS `default` and `mini`; Bone",
        ("miss",),
        "`fold`: `S_r(x) D`",
        fold,
        "tests/adapters/test_format_miss.py",
        methods=("miss",),
    ),
    Served(
        'MiSS with output shards (its paper\'s equation 3; our `shard: "output"`)',
        ("miss",),
        "`lora`, one factor 0/1",
        lora(),
        "tests/adapters/test_format_miss.py",
    ),
    Served(
        "LoRA, rsLoRA, rank and alpha patterns, converted PiSSA (PEFT); LoRA-FA, LoRA+; PRoLoRA "
        "and MoS as their trainers save them",
        ("lora",),
        "`lora`",
        lora(),
        "tests/adapters/test_peft_parity.py",
        methods=("lora", "rslora", "lora-plus"),
    ),
    Served(
        "PiSSA, OLoRA (PEFT); MiLoRA and others that say `base_correction`",
        ("lora",),
        "`lora`, and `core` for what training took out of the base",
        corrected("pissa"),
        "tests/adapters/test_corrections.py",
        methods=("pissa", "milora"),
    ),
    Served(
        "DoRA (PEFT), also on PiSSA's and OLoRA's bases",
        ("dora",),
        "`lora`, and a factor per output",
        dora,
        "tests/adapters/test_format_dora.py",
        methods=("dora",),
    ),
    Served(
        "AdaLoRA (PEFT)",
        ("adalora",),
        "`lora`",
        lora(),
        "tests/adapters/test_format_adalora.py",
        methods=("adalora",),
    ),
    Served(
        "VeRA, with and without saved projections (PEFT), r = 256",
        ("vera",),
        "`lora`",
        lora(256),
        "tests/adapters/test_format_vera.py",
        methods=("vera",),
    ),
    Served(
        "LoHa (PEFT), r = 4: r² columns",
        ("loha",),
        "`lora`",
        lora(4 * 4),
        "tests/adapters/test_format_lycoris.py",
    ),
    Served(
        "LoKr (PEFT), r = 8: 64 · 8 columns of a 4096 x 4096 weight, at most 512",
        ("lokr",),
        "`lora`",
        lora(512),
        "tests/adapters/test_format_lycoris.py",
    ),
    Served(
        "SVF (Transformer²)",
        ("svf",),
        "`spectral`: a diagonal between singular vectors",
        spectral(lambda k: k),
        "tests/adapters/test_format_svf.py",
        methods=("svf",),
    ),
    Served(
        "SVFT: plain, banded, random, top-k; here banded with one off-diagonal on each side",
        ("svft",),
        "`spectral`: a sparse matrix between them",
        spectral(lambda k: 3 * k - 2),
        "tests/adapters/test_format_svft.py",
        methods=("svft",),
    ),
)

_MERGE = "`shoal adapters convert --merge`"
REFUSED: tuple[Refused, ...] = (
    Refused(
        "MiSS and Bone `bat`",
        {"peft_type": "MISS", "init_weights": "bat"},
        "miss_block",
        "bat multiplies the base weights and cannot share a batch",
        _MERGE,
    ),
    Refused(
        "PiSSA `niter`, CorDA, LoRA-GA, LoftQ",
        {"peft_type": "LORA", "init_lora_weights": "corda"},
        "lora_A",
        "corda",
        "PEFT's conversion to plain LoRA",
    ),
    Refused(
        "PRoLoRA, MoS: checkpoints whose factors are still shared",
        {"peft_type": "LORA"},
        "lora_A_vec",
        "factors still shared, and no file says how",
        "the trainer's last `adapter_model.bin`, converted",
    ),
    Refused(
        "KaSA",
        {"peft_type": "LORA", "kasa_config": {"beta": 1}},
        "lora_diag",
        "KaSA is not served",
        "PEFT's `merge_and_unload`",
    ),
    Refused(
        "aLoRA, QA-LoRA, BD-LoRA, routers",
        {"peft_type": "LORA", "alora_invocation_tokens": [1]},
        "lora_A",
        "is not served",
        "",
    ),
    Refused(
        "Trained biases, embeddings, heads, replaced modules",
        {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
        "lora_A",
        "replaced modules are not served",
        "",
    ),
    Refused("IA³, OFT, BOFT, HRA and the rest", {"peft_type": "IA3"}, "ia3_l", "is not served", ""),
)


def table() -> str:
    """The table in Markdown, without a line break at the end."""
    lines = [
        "| adapter | `shoal train` | load | serve in a mixed batch | bytes at 8B | bound per row | "
        "test |",
        "|---|---|---|---|--:|--:|---|",
    ]
    for row in ROWS:
        lines.append(_served(row))
    for refused in REFUSED:
        advice = f"; {refused.advice}" if refused.advice else ""
        test = _link("tests/adapters/test_family_table.py")
        lines.append(f"| {refused.name} | – | refused | no{advice} | – | – | {test} |")
    return "\n".join(lines)


def _served(row: Served) -> str:
    weights = row.example(LLAMA_8B)
    spec = make_spec(weights, LLAMA_8B, "")
    cost = adapter_cost(spec, LLAMA_8B)
    bound = _time(cost.own)
    if cost.shared:
        bound += f" (+ {_time(cost.shared)})"
    methods = ", ".join(f"`{name}`" for name in row.methods) or "–"
    formats = ", ".join(f"`{name}`" for name in row.formats)
    size = _size(spec.packed_elements * DTYPE.itemsize)
    return (
        f"| {row.name} | {methods} | {formats} | {row.how} | {size} | {bound} | {_link(row.test)} |"
    )


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count} B"


def _time(elements: int) -> str:
    """How long reading them takes."""
    microseconds = elements * DTYPE.itemsize / BYTES_PER_SECOND * 1e6
    if microseconds >= 1000:
        return f"{_digits(microseconds / 1000)} ms"
    return f"{_digits(microseconds)} µs"


def _digits(value: float) -> str:
    """Three significant digits at most, none after the point from 10 on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _link(path: str) -> str:
    return f"[{path.rpartition('/')[2].removesuffix('.py').removeprefix('test_')}]({path})"


if __name__ == "__main__":
    print(table())
