"""Writing adapter directories: what the trainer saves and `shoal.adapters.reading` reads back.

Owns the layouts. Each directory gets ``adapter_model.safetensors``, then ``adapter_config.json``,
each written atomically, so that a config never lies beside tensors that are not there yet.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from shoal.adapters.basis import Basis, probes
from shoal.adapters.formats import svf, svft
from shoal.adapters.formats.config_fields import CONFIG_FILE
from shoal.adapters.formats.container import tensor_chunks, write_atomically
from shoal.adapters.formats.keys import OFFICIAL_LATENT, module_path, tensor_name
from shoal.adapters.formats.lora_xs import COMPACT_LATENT, PROBE
from shoal.adapters.formats.spectral_files import PROBE as SVD_PROBE
from shoal.adapters.spec import MODULES, BaseShape, Target
from shoal.adapters.spectral_basis import SpectralBasis, sigma_probe
from shoal.adapters.weights import WeightOf

ExtraConfig = Mapping[str, object] | None


def write_compact_lora_xs(
    directory: Path,
    r: Mapping[Target, Tensor],
    *,
    alpha: float,
    rank: int,
    basis: Basis,
    shape: BaseShape,
    extra_config: ExtraConfig = None,
) -> None:
    """Write LoRA-XS without its frozen factors.

    Args:
        directory: created if needed.
        r: per target ``R (k, k)``, unscaled, ``k = min(rank, d_out, d_in)``.
        alpha: the scale of every target is ``alpha / rank``.
        rank: what was asked for.
        basis: what it was trained on; its leading ``k`` columns are the frozen factors.
        shape: the base.
        extra_config: further fields, e.g. ``base_correction``; may not replace one of ours.
    """
    tensors = {}
    probed = probes(basis)  # kept: of many files on one basis, only the first waits for them
    for target, latent in r.items():
        own = min(rank, *shape.dims[target.module])
        expect(target, latent, own, own)
        tensors[f"{tensor_name(target, COMPACT_LATENT)}.weight"] = latent
        tensors[tensor_name(target, PROBE)] = probed[target][:own]
    config = {
        "peft_type": "LORA_XS",
        "r": rank,
        "lora_alpha": alpha,
        "basis": {"id": basis.id, "base_digest": basis.base_digest, "rank": basis.rank},
    }
    write_files(directory, tensors, config, r, shape, extra_config)


def write_official_lora_xs(
    directory: Path,
    r: Mapping[Target, Tensor],
    *,
    alpha: float,
    rank: int,
    basis: Basis,
    shape: BaseShape,
    weight_of: WeightOf,
    extra_config: ExtraConfig = None,
) -> None:
    """Write LoRA-XS in the authors' layout: ``lora_A = BᵀW``, ``lora_B = B`` and ``R``.

    Arguments as for `write_compact_lora_xs`. Where a small weight limits a target's rank, patterns
    record it and keep its scale at ``alpha / rank``.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, latent in r.items():
        own = min(rank, *shape.dims[target.module])
        expect(target, latent, own, own)
        weight = weight_of(target).detach()
        b = basis.factors[target][:, :own]
        tensors[f"{tensor_name(target, 'lora_A')}.weight"] = b.T.to(weight.device) @ weight.float()
        tensors[f"{tensor_name(target, 'lora_B')}.weight"] = b
        tensors[f"{tensor_name(target, OFFICIAL_LATENT)}.weight"] = latent
        if own != rank:
            ranks[module_path(target)] = own
            alphas[module_path(target)] = alpha * own / rank
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }
    write_files(directory, tensors, config, r, shape, extra_config)


def write_explicit_lora_xs(
    directory: Path,
    factors: Mapping[Target, tuple[Tensor, Tensor, Tensor]],
    *,
    alpha: float,
    rank: int,
    shape: BaseShape,
    extra_config: ExtraConfig = None,
) -> None:
    """Write LoRA-XS in the authors' layout, with frozen factors that need not be the weight's.

    Args:
        factors: per target ``A (rank, d_in)``, ``B (d_out, rank)`` and ``R (rank, rank)``.
        directory, alpha, rank, shape, extra_config: as for `write_compact_lora_xs`.
    """
    tensors: dict[str, Tensor] = {}
    for target, (a, b, latent) in factors.items():
        dims = shape.dims[target.module]
        expect(target, a, rank, dims.d_in)
        expect(target, b, dims.d_out, rank)
        expect(target, latent, rank, rank)
        tensors[f"{tensor_name(target, 'lora_A')}.weight"] = a
        tensors[f"{tensor_name(target, 'lora_B')}.weight"] = b
        tensors[f"{tensor_name(target, OFFICIAL_LATENT)}.weight"] = latent
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "init_lora_weights": True}
    write_files(directory, tensors, config, factors, shape, extra_config)


def write_miss(
    directory: Path,
    d: Mapping[Target, Tensor],
    *,
    rank: int,
    shape: BaseShape,
    by_output: bool = False,
    mini_r: int | None = None,
    extra_config: ExtraConfig = None,
) -> None:
    """Write MiSS, scale 1.

    Args:
        d: per target ``D (rank, d_out)``; with ``mini_r`` ``(rank, mini_r)``; with ``by_output``,
            which PEFT does not have, ``(rank, d_in)``.
        directory, rank, shape, extra_config: as for `write_compact_lora_xs`.
    """
    tensors = {}
    for target, block in d.items():
        dims = shape.dims[target.module]
        expect(target, block, rank, dims.d_in if by_output else mini_r or dims.d_out)
        tensors[tensor_name(target, "miss_block")] = block
    config: dict[str, object] = {"peft_type": "MISS", "r": rank, "init_weights": True}
    if by_output:
        config["shard"] = "output"
    if mini_r is not None:
        config |= {"init_weights": "mini", "mini_r": mini_r}
    write_files(directory, tensors, config, d, shape, extra_config)


def write_lora(
    directory: Path,
    ab: Mapping[Target, tuple[Tensor, Tensor]],
    *,
    alpha: float,
    rank: int,
    shape: BaseShape,
    magnitudes: Mapping[Target, Tensor] | None = None,
    init_lora_weights: bool | str = True,
    extra_config: ExtraConfig = None,
) -> None:
    """Write PEFT LoRA, scale alpha / rank unless ``extra_config`` says otherwise.

    Args:
        ab: per target ``A (rank, d_in)`` and ``B (d_out, rank)``.
        magnitudes: DoRA's, per target ``(d_out)``; None: no DoRA.
        init_lora_weights: what PEFT is to do to the base.
        directory, alpha, rank, shape, extra_config: as for `write_compact_lora_xs`.
    """
    tensors = {}
    for target, (a, b) in ab.items():
        dims = shape.dims[target.module]
        expect(target, a, rank, dims.d_in)
        expect(target, b, dims.d_out, rank)
        tensors[f"{tensor_name(target, 'lora_A')}.weight"] = a
        tensors[f"{tensor_name(target, 'lora_B')}.weight"] = b
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "init_lora_weights": init_lora_weights,
    }
    if magnitudes is not None:
        config["use_dora"] = True
        for target, magnitude in magnitudes.items():
            expect(target, magnitude, shape.dims[target.module].d_out)
            tensors[tensor_name(target, "lora_magnitude_vector")] = magnitude
    write_files(directory, tensors, config, ab, shape, extra_config)


def expect(target: Target, tensor: Tensor, *expected: int) -> None:
    """ValueError unless the tensor has exactly this shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{target}: shape {list(tensor.shape)} must be {list(expected)}")


def write_files(
    directory: Path,
    tensors: Mapping[str, Tensor],
    own_config: Mapping[str, object],
    targets: Iterable[Target],
    shape: BaseShape,
    extra_config: ExtraConfig,
) -> None:
    """Write both files of an adapter.

    Args:
        tensors: by their full names.
        own_config: what the layout adds to the fields that all have.
        targets: what is adapted.
        directory, shape, extra_config: as for `write_compact_lora_xs`.
    """
    targets = list(targets)
    if not targets:
        raise ValueError("an adapter needs at least one target")
    config = {
        "base_model_name_or_path": shape.name,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _target_modules(targets, shape),
        "task_type": "CAUSAL_LM",
        **own_config,
    }
    taken = set(config) & set(extra_config or {})
    if taken:
        raise ValueError(f"extra_config must not replace {', '.join(sorted(taken))}")
    text = json.dumps({**config, **(extra_config or {})}, indent=2, sort_keys=True) + "\n"
    write_atomically(
        directory / "adapter_model.safetensors", tensor_chunks(tensors, {"format": "pt"})
    )
    write_atomically(directory / CONFIG_FILE, [text.encode()])


def _target_modules(targets: list[Target], shape: BaseShape) -> list[str]:
    """Module names when every layer has them, else full paths: PEFT builds modules from these."""
    modules = [m for m in MODULES if any(target.module == m for target in targets)]
    if len(targets) == len(modules) * shape.num_layers:
        return modules
    return [module_path(target) for target in targets]


def write_svf(
    directory: Path,
    vectors: Mapping[Target, Tensor],
    *,
    basis: SpectralBasis,
    settings: ExtraConfig = None,
    extra_config: ExtraConfig = None,
) -> None:
    """Write SVF (`svf.py`).

    Args:
        vectors: per target ``(k,)``, logits unless ``settings`` says otherwise.
        basis: the base's singular vectors; probes of them go into the file.
        settings: ``vector``, ``max_mult`` and ``renormalise``, where they are not the defaults.
    """
    tensors = {}
    for target, vector in vectors.items():
        expect(target, vector, min(basis.shape.dims[target.module]))
        tensors[tensor_name(target, svf.VECTOR)] = vector
        tensors[tensor_name(target, SVD_PROBE)] = sigma_probe(basis.sigma(target), target)
    config = {"peft_type": "SVF", "basis": {"id": basis.id}, **(settings or {})}
    write_files(directory, tensors, config, vectors, basis.shape, extra_config)


def write_svft(
    directory: Path,
    entries: Mapping[Target, tuple[Tensor, Tensor, Tensor]],
    *,
    basis: SpectralBasis,
    gates: Mapping[Target, Tensor] | None = None,
    s_pre: Mapping[Target, Tensor] | None = None,
    extra_config: ExtraConfig = None,
) -> None:
    """Write SVFT (`svft.py`).

    Args:
        entries: per target the rows and columns (int32) and the values of M, ``(e,)``.
        basis: the base's singular vectors, whose signs the entries are in; probed as for SVF.
        gates: per target ``(1,)``, before the sigmoid; where absent, the values are final.
        s_pre: per target ``(n,)``: the singular values that training kept.
    """
    tensors = {}
    for target, (rows, columns, values) in entries.items():
        for part in (rows, columns):
            expect(target, part, len(values))
        tensors[tensor_name(target, svft.ROWS)] = rows
        tensors[tensor_name(target, svft.COLUMNS)] = columns
        tensors[tensor_name(target, svft.VALUES)] = values
        tensors[tensor_name(target, SVD_PROBE)] = basis.probe(target)
        if gates is not None and target in gates:
            tensors[tensor_name(target, svft.GATE)] = gates[target]
        if s_pre is not None and target in s_pre:
            tensors[tensor_name(target, svft.S_PRE)] = s_pre[target]
    config = {"peft_type": "SVFT", "basis": {"id": basis.id}}
    write_files(directory, tensors, config, entries, basis.shape, extra_config)
