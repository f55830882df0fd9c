"""``Source``: the base that methods start from: its weights and their decompositions.

Each decomposition is computed when it is first asked for, for all targets, and kept in the cache
directory under the base's digest.
"""

from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from shoal.adapters.basis import DEFAULT_RANK, Basis, canonical_basis
from shoal.adapters.spec import BaseShape
from shoal.adapters.weights import WeightOf


class Source:
    """The base's weights, and what was computed of them.

    Attributes:
        weight_of: the weights before they were rounded to what training runs in.
        shape: the base.
    """

    def __init__(
        self,
        weight_of: WeightOf,
        shape: BaseShape,
        cache_dir: Path,
        *,
        basis_rank: int | None = None,
        progress: bool = False,
    ) -> None:
        """Reads and computes nothing.

        Args:
            weight_of, shape: the base.
            cache_dir: where decompositions are kept.
            basis_rank: rank of the canonical basis; None: as servers have it.
            progress: draw progress bars on standard error.
        """
        self.weight_of = weight_of
        self.shape = shape
        self._cache_dir = cache_dir
        self._basis_rank = DEFAULT_RANK if basis_rank is None else basis_rank
        self._progress = progress

    @cached_property
    def canonical(self) -> Basis:
        """The basis that LoRA-XS adapters of this base share."""
        with tqdm(desc="basis", unit="linear", disable=not self._progress, leave=False) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return canonical_basis(
                self.weight_of, self.shape, self._basis_rank, self._cache_dir, report
            )
