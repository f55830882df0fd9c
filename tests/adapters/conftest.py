"""The golden adapters (`golden/make_golden.py`) and what reading them needs."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.adapters.basis import Basis, BasisStore, compute_basis
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """A tiny base, its canonical basis, an empty store of bases, and adapters to read."""

    shape: BaseShape
    weights: Mapping[Target, Tensor]
    canonical: Basis
    bases: BasisStore
    folder: Path

    def weight_of(self, target: Target) -> Tensor:
        return self.weights[target]

    def copy(self, case: str) -> Path:
        """A copy of a case's directory that a test may change."""
        source = GOLDEN / case
        if (source / "weight").is_dir():
            source = source / "weight"
        return Path(shutil.copytree(source, self.folder / "cases" / case, dirs_exist_ok=True))

    def read(
        self, directory: Path, *, max_bases: int = 4, max_bytes: int = 1 << 20
    ) -> AdapterWeights:
        return self.read_files(adapter_files(directory), max_bases=max_bases, max_bytes=max_bytes)

    def read_files(
        self, files: Mapping[str, Path], *, max_bases: int = 4, max_bytes: int = 1 << 20
    ) -> AdapterWeights:
        return read_adapter(
            files,
            shape=self.shape,
            weight_of=self.weight_of,
            bases=self.bases,
            canonical=self.canonical,
            max_bytes=max_bytes,
            max_bases=max_bases,
        )

    def expected(self, case: str) -> dict[Target, Tensor]:
        """What the case changes: float32 ΔW by target."""
        return {target_of(n): t for n, t in load_file(GOLDEN / f"{case}.delta.safetensors").items()}

    def delta(self, weights: AdapterWeights, target: Target) -> Tensor:
        """ΔW in float64, from the definitions of the families."""
        parts = [part.double() for part in weights.tensors[target]]
        d_in = self.shape.dims[target.module].d_in
        scale = weights.scales[target]
        if weights.family == "lora":
            return scale * parts[1] @ parts[0]
        if weights.family == "fold":
            rank = parts[0].shape[0]
            return scale * parts[0].T[:, [j % rank for j in range(d_in)]]
        basis = self.canonical if weights.basis_id == self.canonical.id else None
        basis = basis or self.bases.get(weights.basis_id or "")
        assert basis is not None
        b = basis.factors[target][:, : parts[0].shape[0]].double()
        return scale * b @ parts[0] @ (b.T @ self.weights[target].double())

    def assert_delta(self, weights: AdapterWeights, case: str, rtol: float = 1e-5) -> None:
        """The adapter changes what the case says, on exactly its targets."""
        expected = self.expected(case)
        assert set(weights.tensors) == set(weights.scales) == set(expected)
        for target, delta in expected.items():
            error = (self.delta(weights, target) - delta).norm() / delta.norm()
            assert error < rtol, (target, float(error))

    def edit_config(self, directory: Path, **changes: Any) -> Path:
        """Change fields of a copy's config."""
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return directory

    def tensors(self, directory: Path) -> dict[str, Tensor]:
        return load_file(directory / "adapter_model.safetensors")

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Replace a copy's tensors."""
        save_file(dict(tensors), directory / "adapter_model.safetensors")
        return directory


def target_of(path: str) -> Target:
    parts = path.split(".")
    return Target(int(parts[2]), parts[4])


@pytest.fixture(scope="session")
def golden_base() -> tuple[BaseShape, dict[Target, Tensor], Basis]:
    weights = {target_of(n): t for n, t in load_file(GOLDEN / "base.safetensors").items()}
    dims = {module: Dims(*weights[Target(0, module)].shape) for module in MODULES}
    shape = BaseShape(name="tiny", digest="d" * 64, num_layers=2, dims=dims)
    return shape, weights, compute_basis(weights.__getitem__, shape, 8)


@pytest.fixture
def golden(tmp_path: Path, golden_base: tuple[BaseShape, dict[Target, Tensor], Basis]) -> Golden:
    torch.manual_seed(0)
    return Golden(*golden_base, BasisStore(tmp_path / "bases"), tmp_path)
