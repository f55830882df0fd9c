"""A tiny base of awkward shapes for the tests of spectral formats, and the way in.

Oracles compute with what the papers say on NumPy's own decomposition in float64, never with
`shoal.adapters.spectral_basis`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from shoal.adapters.basis import BasisStore, compute_basis
from shoal.adapters.reading import read_adapter
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import AdapterWeights

Array = NDArray[np.float64]

# Square, wider than tall (k, v, down), taller than wide (gate, up).
SHAPE = BaseShape(
    name="tiny",
    digest="7" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(15, 15),
        "k_proj": Dims(6, 15),
        "v_proj": Dims(6, 15),
        "o_proj": Dims(15, 15),
        "gate_proj": Dims(21, 15),
        "up_proj": Dims(21, 15),
        "down_proj": Dims(15, 21),
    },
)
MLP = ("gate_proj", "up_proj", "down_proj")


def path_of(target: Target) -> str:
    """The name of a target's weight in a Hugging Face checkpoint, without ``.weight``."""
    block = "mlp" if target.module in MLP else "self_attn"
    return f"model.layers.{target.layer}.{block}.{target.module}"


def key(target: Target, kind: str) -> str:
    """The name of an adapter's tensor."""
    return f"base_model.model.{path_of(target)}.{kind}"


class World:
    """Weights, and a folder to read adapters from."""

    def __init__(self, folder: Path, seed: int = 0, digest: str = SHAPE.digest) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            target: torch.randn(*SHAPE.dims[target.module], generator=generator)
            for target in SHAPE.targets()
        }
        self.shape = BaseShape(SHAPE.name, digest, SHAPE.num_layers, SHAPE.dims)
        self.folder = folder
        self.canonical = compute_basis(self.weight_of, self.shape, 4)
        self.basis = SpectralBasis(self.weight_of, self.shape, folder / f"svd-{seed}")

    def weight_of(self, target: Target) -> Tensor:
        return self.weights[target]

    def w(self, target: Target) -> Array:
        """The weight in float64."""
        return np.asarray(self.weights[target].double())

    def sizes(self, target: Target) -> tuple[int, int, int]:
        """d_out, d_in and their minimum."""
        d_out, d_in = SHAPE.dims[target.module]
        return d_out, d_in, min(d_out, d_in)

    def save(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        """An adapter directory."""
        directory = self.folder / "adapter"
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(dict(config)))
        save_file(dict(tensors), directory / "adapter_model.safetensors")
        return directory

    def read(
        self, directory: Path, *, max_bytes: int = 1 << 20, spectral: bool = True
    ) -> AdapterWeights:
        names = ("adapter_config.json", "adapter_model.safetensors")
        return read_adapter(
            {name: directory / name for name in names},
            shape=self.shape,
            weight_of=self.weight_of,
            bases=BasisStore(self.folder / "bases"),
            canonical=self.canonical,
            max_bytes=max_bytes,
            max_bases=4,
            spectral=self.basis if spectral else None,
        )

    def merged(self, weights: AdapterWeights, target: Target) -> Array:
        """W and what a read adapter adds to it, by the definition of the family."""
        if target not in weights.tensors:
            return self.w(target)
        rows, columns, values = weights.tensors[target]
        assert rows.dtype == columns.dtype == torch.int32
        factors = self.basis.factors(target)
        k = len(factors.sigma)
        m = np.zeros((k, k))
        np.add.at(m, (rows.numpy(), columns.numpy()), values.double().numpy())
        u, v = (np.asarray(part.double()) for part in (factors.u, factors.v))
        return self.w(target) + weights.scales[target] * (u @ m @ v.T)


def assert_close(got: Array, want: Array, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest element."""
    assert got.shape == want.shape
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert error <= tolerance, error


def targets(*modules: str) -> list[Target]:
    return [target for target in SHAPE.targets() if target.module in (modules or MODULES)]
