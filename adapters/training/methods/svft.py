"""SVFT: ``ΔW = U M Vᵀ``, a sparse trained ``M`` between all singular vectors of the weight.

Which entries are trained is a pattern (`places`). They start at zero; the authors start them at
random behind a trained gate, so that their first step is not the base's. A gate changes nothing
that the entries cannot say, and is left out.

``M`` is made dense for a step, ``k²`` values a linear beside the ``2k·d`` of U and V.

Source: SVFT (arXiv 2405.19597).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.families.spectral import ENTRIES_PER_COMPONENT
from shoal.adapters.formats.writing import write_svft
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import Factors
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.contract import (
    WHOLE_BASE,
    Adapted,
    AdaptedLinear,
    Method,
    Start,
)
from shoal.adapters.training.methods.source import Source


class SvftLinear(AdaptedLinear):
    """``M (lanes, e)``, the entries at ``place (lanes, e)``: ``y = y0 + ((x V) Mᵀ) Uᵀ``.

    Attributes:
        place: ``row · k + column``, int64, sorted.
    """

    u: Tensor
    v: Tensor
    place: Tensor

    def __init__(self, linear: nn.Linear, svd: Factors, place: Tensor) -> None:
        """Takes the weight's singular vectors and the places of each lane."""
        super().__init__(linear, len(place))
        weight = linear.weight
        self.register_buffer("u", svd.u.to(weight), persistent=False)
        self.register_buffer("v", svd.v.to(weight), persistent=False)
        self.register_buffer("place", place.to(weight.device), persistent=False)
        self.entries = nn.Parameter(torch.zeros(place.shape, device=weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """As above, in the base's dtype."""
        k = self.u.shape[1]
        empty = torch.zeros(
            (self.lanes, k * k), dtype=self.entries.dtype, device=self.entries.device
        )
        dense = empty.scatter(1, self.place, self.entries).view(self.lanes, k, k)
        h = torch.bmm(x @ self.v, dense.to(x.dtype).mT)
        return y0 + h @ self.u.T

    def factors(self) -> dict[str, nn.Parameter]:
        """``M``."""
        return {"M": self.entries}


def places(pattern: str, off_diagonals: int, svd: Factors, generator: torch.Generator) -> Tensor:
    """Which entries of ``M (k, k)`` are trained: ``row · k + column``, sorted, ``(e,)`` int64.

    ``banded``: the diagonals from ``-off_diagonals`` to ``off_diagonals``. The others have as many
    entries: ``random`` ones, or the ``top-k`` of ``UᵀV`` by size, for square weights; of others
    the part that has both, where a component's input and output directions align most.
    """
    k = len(svd.sigma)
    d = min(off_diagonals, k - 1)
    count = k * (2 * d + 1) - d * (d + 1)
    if pattern == "banded":
        index = torch.arange(k)
        near = (index[:, None] - index).abs() <= d
        return near.flatten().nonzero().squeeze(1)
    if pattern == "random":
        return torch.randperm(k * k, generator=generator)[:count].sort().values
    side = min(len(svd.u), len(svd.v))
    alike = (svd.u[:side].T @ svd.v[:side]).abs().flatten()
    return alike.topk(count).indices.sort().values


@dataclass(frozen=True, slots=True)
class Svft(Method):
    """SVFT.

    Attributes:
        pattern: ``banded``, ``random`` or ``top-k``.
        off_diagonals: on either side; 0 is the paper's "plain".
    """

    name: ClassVar[MethodName] = "svft"
    pattern: str = "banded"
    off_diagonals: int = 0

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Pattern and width."""
        return cls(config.pattern or "banded", config.off_diagonals or 0)

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``M`` zero."""
        svd = start.source.spectral.factors(target)
        most = (ENTRIES_PER_COMPONENT - 1) // 2
        if self.off_diagonals > most:
            raise OptionRejected("off-diagonals", self.off_diagonals, f"must not exceed {most}")
        place = [places(self.pattern, self.off_diagonals, svd, g) for g in start.generators]
        return SvftLinear(linear, svd, torch.stack(place))

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """Our layout: the authors publish fused models."""
        entries: dict[Target, tuple[Tensor, Tensor, Tensor]] = {}
        for target, linear in adapted.items():
            assert isinstance(linear, SvftLinear)
            k = linear.u.shape[1]
            place = linear.place[lane].cpu()
            entries[target] = (
                (place // k).int(),
                (place % k).int(),
                linear.values(lane)["M"],
            )
        write_svft(directory, entries, basis=source.spectral, extra_config=WHOLE_BASE)
