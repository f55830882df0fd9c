"""The words of the adapter world as plain data: targets, base shape, families, slots.

Pure: imports no tensor library, so the scheduler and the registry can use it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Family = Literal["core", "fold", "lora", "spectral"]
SectionKind = Literal["core", "scale", "lora", "fold", "spectral"]
Group = Literal["qkv", "o", "gate_up", "down"]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Modules whose base weights are one fused matrix (outputs concatenated in this order) and which
# therefore share one input and one GEMM. Adapter data is packed in the same order.
GROUPS: Mapping[Group, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}

# What extents of the device bank, and sections of a record, are multiples of. 1024 wastes 4 % on a
# rank-8 LoRA-XS of a 30-layer base (13,440 elements), and keeps records aligned for vector loads.
UNIT_ELEMENTS = 1024

ADAPTER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class Target(NamedTuple):
    """One adapted linear of the base."""

    layer: int
    module: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.module}"


class Dims(NamedTuple):
    """Shape of a linear's weight, ``(d_out, d_in)`` as in ``torch.nn.Linear``."""

    d_out: int
    d_in: int


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What an adapter must fit: the layer count and the shape of every adaptable linear.

    ``digest`` identifies the base's weights (see ``shoal.adapters.base.base_digest``).
    """

    name: str
    digest: str
    num_layers: int
    dims: Mapping[str, Dims]

    def targets(self) -> tuple[Target, ...]:
        """Every adaptable linear, layer by layer, modules in ``MODULES`` order."""
        return tuple(Target(layer, m) for layer in range(self.num_layers) for m in MODULES)

    def group_dims(self, group: Group) -> Dims:
        """Shape of the fused weight of ``group``."""
        parts = [self.dims[module] for module in GROUPS[group]]
        return Dims(sum(part.d_out for part in parts), parts[0].d_in)


class Section(NamedTuple):
    """One part of an adapter's packed record, for one kind of kernel.

    Most adapters have one section, of their family. A ``lora`` adapter that was trained on a
    residual base has a ``core`` one before it (what was taken out of the base), and DoRA a
    ``scale`` one (a factor per output); a blend may have one of every kind, but for ``core`` beside
    ``scale``. Sections apply in the order in which they lie.

    Attributes:
        kind: what applies it.
        rank: its data is packed at this rank; 0 for ``scale``.
        unit: where it starts, in bank units from the start of the record.
        basis_id: the shared factors of a ``core`` or ``spectral`` section, else None.
    """

    kind: SectionKind
    rank: int
    unit: int = 0
    basis_id: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter version as the engine sees it.

    Attributes:
        digest: sha256 (hex) of the canonical record, or of what a blend is the sum of; identifies
            content, never reused.
        family: how it acts; of a blend, the kind of its last section.
        rank: largest rank over its targets; all its data is packed at this rank.
        basis_id: which shared basis a ``core`` adapter uses, else None.
        packed_elements: elements it takes in the device bank.
        extra: sections before that of the family.
        unit: where the family's own section starts, in bank units from the start of the record.
        sections: all of them, in the order in which they lie and apply.
    """

    digest: str
    family: Family
    rank: int
    basis_id: str | None
    packed_elements: int
    extra: tuple[Section, ...] = ()
    unit: int = 0
    sections: tuple[Section, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Kept, because every row of every step asks: made anew they double the time to plan it.
        own = Section(self.family, self.rank, self.unit, self.basis_id)
        object.__setattr__(self, "sections", (*self.extra, own))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one adapter sits in the device bank: an extent of equal-sized units."""

    unit: int
    num_units: int


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """What a planned row says about its adapter: integers and names, no tensors."""

    spec: AdapterSpec
    slot: Slot
