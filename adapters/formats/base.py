"""What an on-disk format is, and the registry of formats.

A format turns the tensors of a file, already read safely and sorted by target, into validated
``AdapterWeights``. It never touches files. Adding one: README.md in this folder.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.config_fields import CONFIG_FILE, Config
from shoal.adapters.formats.container import printable
from shoal.adapters.formats.keys import (
    SHARED_PREFIX,
    NamedTensor,
    group_by_target,
    refusal,
    split_name,
    split_shared,
    tensor_name,
)
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import AdapterWeights, WeightOf

# LoHa's r² and LoKr's k1·k2. PEFT's default LoKr (r = 8) on a 4096 x 4096 weight has 512.
PRODUCT_RANK_MAX = 512


NO_ELEMENTS = (
    "has no elements: an adapter whose shards were not gathered before it was saved (ZeRO-3, FSDP) "
    "has lost its weights"
)


@dataclass(frozen=True, slots=True)
class RawAdapter:
    """A file's content: the config as parsed, the tensors by target and kind.

    Attributes:
        shared: tensors that belong to no module, by what follows ``base_model.``.
    """

    config: Config
    targets: Mapping[Target, Mapping[str, NamedTensor]]
    shared: Mapping[str, NamedTensor] = field(default_factory=dict)

    def part(self, target: Target, kind: str) -> NamedTensor:
        """A tensor that must be there.

        Raises:
            AdapterRejected: it is missing; names it.
        """
        found = self.targets[target].get(kind)
        if found is None:
            raise AdapterRejected(tensor_name(target, kind), "is missing")
        return found

    def matrix(self, target: Target, kind: str) -> NamedTensor:
        """Like `part`, and must have two axes."""
        return _with_two_axes(self.part(target, kind))

    def shared_matrix(self, kind: str) -> NamedTensor:
        """A tensor of no module that must be there and have two axes.

        Raises:
            AdapterRejected: it is missing, or has another number of axes; names it.
        """
        found = self.shared.get(kind)
        if found is None:
            raise AdapterRejected(SHARED_PREFIX + kind, "is missing")
        return _with_two_axes(found)


def _with_two_axes(named: NamedTensor) -> NamedTensor:
    if named.tensor.ndim != 2:
        raise AdapterRejected(named.name, f"shape {list(named.tensor.shape)} must have two axes")
    return named


@dataclass(frozen=True, slots=True)
class ReadContext:
    """What an adapter is read against.

    Attributes:
        shape, weight_of: the base.
        bases: bases that uploads brought.
        canonical: the base's own basis.
        max_bases: how many uploaded bases may be known.
        max_bytes: limit for the tensors of one adapter in memory.
        max_rank: of the explicit factors that a product of small matrices may stand for.
        spectral: the base's singular vectors, where they can be had.
    """

    shape: BaseShape
    weight_of: WeightOf
    bases: BasisStore
    canonical: Basis
    max_bases: int
    max_bytes: int
    max_rank: int = PRODUCT_RANK_MAX
    spectral: SpectralBasis | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """One on-disk format.

    Attributes:
        name: ``AdapterWeights.format``.
        markers: tensor kinds any of which makes a file this format.
        kinds: every tensor kind a file may hold; includes the markers.
        peft_types: values of ``peft_type`` that fit these tensors.
        read: raises AdapterRejected, or returns weights after its last refusal and side effect.
        shared: what a file may hold besides, as ``base_model.<kind>``.
        empty: whether tensors may have sizes of zero: modules that were left with rank 0.
        integers: kinds that hold indices; all others hold floating-point numbers.
    """

    name: str
    markers: frozenset[str]
    kinds: frozenset[str]
    peft_types: frozenset[str]
    read: Callable[[RawAdapter, ReadContext], AdapterWeights]
    shared: re.Pattern[str] | None = None
    empty: bool = False
    integers: frozenset[str] = frozenset()


def check_shape(named: NamedTensor, *expected: int) -> Tensor:
    """The tensor, which must have exactly this shape; AdapterRejected names it otherwise."""
    if tuple(named.tensor.shape) != expected:
        raise AdapterRejected(
            named.name, f"shape {list(named.tensor.shape)} must be {list(expected)}"
        )
    return named.tensor


@dataclass(slots=True)
class FormatRegistry:
    """The formats, in the order in which they are tried.

    Order matters where one format's tensors include another's: the more specific comes first.
    """

    _formats: list[Format] = field(default_factory=list)

    def register(self, new: Format) -> None:
        """Add a format.

        Raises:
            ValueError: a bad or taken name, no markers, markers that it may not hold, or that an
                earlier format would always claim.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", new.name):
            raise ValueError(f"format name {new.name!r} must be lower case letters, digits, _")
        if any(known.name == new.name for known in self._formats):
            raise ValueError(f"format {new.name!r} is registered already")
        if not new.markers or not new.markers <= new.kinds or not new.peft_types:
            raise ValueError(f"format {new.name!r} needs peft_types, and markers among its kinds")
        for known in self._formats:
            if known.markers & new.markers:
                raise ValueError(
                    f"format {new.name!r} shares the markers "
                    f"{sorted(known.markers & new.markers)} with {known.name!r}"
                )
        self._formats.append(new)

    def names(self) -> tuple[str, ...]:
        """Registered names, in order."""
        return tuple(known.name for known in self._formats)

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], context: ReadContext
    ) -> AdapterWeights:
        """Classify by tensors, then check the config, then let the format read.

        Raises:
            AdapterRejected: names the tensor or field, and the rule.
        """
        chosen = self._classify(config, tensors)
        peft_type = config.get("peft_type")
        if not isinstance(peft_type, str) or peft_type not in chosen.peft_types:
            raise AdapterRejected(
                f"{CONFIG_FILE}: peft_type",
                f"is {printable(str(peft_type))}, but the tensors are those of {chosen.name}; "
                f"must be {' or '.join(sorted(chosen.peft_types))}",
            )
        shared, rest = split_shared(tensors, chosen.shared)
        for name, tensor in tensors.items():
            if not tensor.numel() and not (chosen.empty and name in rest):
                raise AdapterRejected(printable(name), f"shape {list(tensor.shape)} {NO_ELEMENTS}")
            if tensor.is_floating_point() == (split_name(name)[1] in chosen.integers):
                held = "integers" if tensor.is_floating_point() else "floating-point numbers"
                raise AdapterRejected(printable(name), f"is {tensor.dtype}, must hold {held}")
        targets = group_by_target(rest, chosen.kinds, chosen.name, context.shape)
        weights = chosen.read(RawAdapter(config, targets, shared), context)
        check_scaled(weights)
        return weights

    def _classify(self, config: Config, tensors: Mapping[str, Tensor]) -> Format:
        kinds = {split_name(name)[1] for name in tensors}
        for known in self._formats:
            if known.markers & kinds:
                return known
        for name in tensors:
            raise AdapterRejected(
                printable(name),
                refusal(name)
                or f"belongs to no format that is served ({', '.join(self.names())}); "
                f"{CONFIG_FILE} says peft_type {printable(str(config.get('peft_type')))}",
            )
        raise AdapterRejected("adapter_model.safetensors", "holds no tensors")


def check_scaled(weights: AdapterWeights) -> None:
    """Refuse tensors that overflow float32 once the scale is folded in; names the target."""
    limit = torch.finfo(torch.float32).max
    for target, parts in weights.tensors.items():
        scale = abs(weights.scales[target])
        for part in parts:
            largest = float(part.abs().max()) if part.numel() else 0.0
            if not scale <= limit or not scale * largest <= limit:  # nor when it is NaN
                raise AdapterRejected(
                    str(target), f"scale {scale:g} times the largest value {largest:g} overflows"
                )


def registry_of(formats: Iterable[Format]) -> FormatRegistry:
    """A registry of these formats, in this order."""
    made = FormatRegistry()
    for each in formats:
        made.register(each)
    return made
