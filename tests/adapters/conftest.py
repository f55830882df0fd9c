"""The golden adapters (`golden/make_golden.py`), what reading them needs, and PEFT as an oracle."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.databases import database, database_url, postgres
from torch import Tensor

from shoal.adapters.basis import Basis, BasisStore, compute_basis
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

__all__ = ["database", "database_url", "postgres"]

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


class PeftBase:
    """A tiny random Llama with odd widths that PEFT adapts; what it computes is the truth.

    Attributes:
        weights: of the base, float32; tests may replace them before they read.
    """

    def __init__(self, folder: Path, canonical_rank: int) -> None:
        self.folder = folder
        self.weights: dict[Target, Tensor] = {}
        for name, tensor in self.model().state_dict().items():
            if name.split(".")[-2] in MODULES:
                self.weights[target_of(name)] = tensor
        dims = {module: Dims(*self.weights[Target(0, module)].shape) for module in MODULES}
        self.shape = BaseShape(name="odd", digest="0" * 64, num_layers=2, dims=dims)
        self.canonical = compute_basis(self.weights.__getitem__, self.shape, canonical_rank)
        self.bases = BasisStore(folder / "bases")

    def model(self) -> Any:
        """A fresh copy, the same every time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=21,
            intermediate_size=27,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=10,
            vocab_size=32,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()

    def adapted(self, config: Any, *, dtype: torch.dtype | None = None) -> Any:
        """The model with PEFT's adapter on it, its trained parameters moved by noise.

        Args:
            config: PEFT's.
            dtype: what the parameters are then rounded to.
        """
        from peft import get_peft_model

        model = get_peft_model(self.model(), config)
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
            if parameter.requires_grad or "lora_" in name:
                parameter.data = parameter.data.to(dtype or parameter.dtype).to(parameter.dtype)
        return model.eval()

    def save(self, model: Any, *, dtype: torch.dtype | None = None, **changes: Any) -> Path:
        """PEFT's files, with config fields changed and tensors of another dtype."""
        out = self.folder / "saved"
        shutil.rmtree(out, ignore_errors=True)
        model.save_pretrained(out)
        if dtype is not None:
            self.put(out, {name: tensor.to(dtype) for name, tensor in self.tensors(out).items()})
        return self.edit(out, **changes)

    def read(
        self,
        directory: Path,
        *,
        max_bases: int = 4,
        max_bytes: int = 1 << 20,
        weight_of: Callable[[Target], Tensor] | None = None,
    ) -> AdapterWeights:
        return read_adapter(
            adapter_files(directory),
            shape=self.shape,
            weight_of=weight_of or self.weights.__getitem__,
            bases=self.bases,
            canonical=self.canonical,
            max_bytes=max_bytes,
            max_bases=max_bases,
        )

    def edit(self, directory: Path, **changes: Any) -> Path:
        """Change fields of a saved config."""
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return directory

    def tensors(self, directory: Path) -> dict[str, Tensor]:
        return load_file(directory / "adapter_model.safetensors")

    def put(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Replace the saved tensors."""
        save_file(dict(tensors), directory / "adapter_model.safetensors")
        return directory

    def basis(self, basis_id: str | None) -> Basis:
        known = self.canonical if basis_id == self.canonical.id else self.bases.get(basis_id or "")
        assert known is not None
        return known

    def output(self, weights: AdapterWeights, target: Target, x: Tensor) -> Tensor:
        """What the adapted module gives, in float64, from the definitions in `AdapterWeights`."""
        w = self.weights[target].double()
        x = x.double()
        y0 = x @ w.T
        if target not in weights.tensors:
            return y0
        y = y0.clone()
        scale = weights.scales[target]
        if weights.correction is not None:
            correction = weights.correction
            b = self.basis(correction.basis_id).factors[target].double()
            b = b[:, : correction.ranks[target]]
            y -= correction.scales[target] * (y0 @ b) @ b.T
        if weights.family == "lora":
            a, b = (part.double() for part in weights.tensors[target])
            y += scale * (x @ a.T) @ b.T
        else:
            assert weights.family == "core"
            r = weights.tensors[target][0].double()
            b = self.basis(weights.basis_id).factors[target].double()[:, : r.shape[0]]
            y += scale * (y0 @ b) @ r.T @ b.T
        g = weights.row_scales.get(target)
        return y if g is None else g.double() * y

    def error(self, weights: AdapterWeights, model: Any) -> float:
        """Largest difference to PEFT's own modules, of the largest output of the module."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        worst = 0.0
        for target in self.shape.targets():
            block = "mlp" if target.module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            path = f"model.layers.{target.layer}.{block}.{target.module}"
            module = model.get_base_model().get_submodule(path)
            assert isinstance(module, BaseTunerLayer) or target not in weights.tensors, target
            x = torch.randn(5, self.shape.dims[target.module].d_in)
            with torch.no_grad():
                theirs = module(x).double()
            ours = self.output(weights, target, x)
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
        return worst


@pytest.fixture
def peft_base(tmp_path: Path) -> PeftBase:
    return PeftBase(tmp_path, canonical_rank=8)
