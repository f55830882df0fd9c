"""The authors' own SVF and SVFT checkpoints, as adapters of ours (`formats/svf.py`, `svft.py`).

Offline, part of ``shoal adapters convert``; pickles are read by torch's restricted unpickler.

*SVF* (Transformer²): ``policy_params*.pt`` holds ``learnable_params_module_list.<n>``, where n
counts the base's weights whose name contains ``mlp``, in the order of its state dict: gate, up and
down, layer by layer. ``learnable_params*.pt`` holds the same by parameter name. Both are logits.
Singular vectors are not in there; a ``…decomposed_params.pt`` (``<name>.U``, ``.S``, ``.V``) in the
same folder is compared with ours. SVF does not see signs, only an order and, where singular
values nearly coincide, the choice of vectors.

*SVFT*: a trainer's checkpoint holds ``<module>.svft_layer.{u, v, s_pre, s, gate, s_row, s_col, …}``
and the rest of the model. u and v are the trainer's, with signs, order and filling columns of their
own; what the module computes, ``u (diag(s_pre) + sigmoid(gate) M) v − W``, is taken into the base's
singular vectors as it is, ``Uᵀ · V``, and the smallest entries are left out while that changes W by
less than ``DROPPED_MAX``. So rotated vectors need no guess: they cost entries, and where that would
be too many, or columns lie outside of W's own, the checkpoint is refused.

Source: SakanaAI/self-adaptive-llms; VijayLingam95/SVFT.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.adapters.converting import ConversionError, read_pickle
from shoal.adapters.families.spectral import ENTRIES_PER_COMPONENT
from shoal.adapters.formats.keys import module_path
from shoal.adapters.formats.writing import write_svf, write_svft
from shoal.adapters.merging import target_of
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import Factors, SpectralBasis
from shoal.adapters.weights import WeightOf

# Of ‖W‖: what leaving out entries of M may change. An SVD in float32 leaves 3e-6 all over M.
DROPPED_MAX = 1e-5
# Of ‖W‖: what an SVF adapter may differ from the authors' by, for other singular vectors. Theirs
# are rounded to bfloat16 when used, which is 4e-3.
VECTORS_MAX = 1e-3

Kind = Literal["svf", "svft"]
# The base's tensor of that name, None where it has none or cannot tell.
TensorOf = Callable[[str], Tensor | None]

_MLP = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = re.compile(r"learnable_params_module_list\.(0|[1-9][0-9]{0,5})")
_LAYER = re.compile(r"(.+)\.svft_layer\.([a-z_]+)")
_HINT = "the model that the authors' code fuses at the end is exact: serve that as a base"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, or of a ``.safetensors`` file.

    Raises:
        ConversionError: unreadable, or anything but named tensors.
        OSError: there is no such file.
    """
    if path.suffix != ".safetensors":
        return read_pickle(path, integers=True)
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConversionError(f"{path.name} cannot be read: {error}", "save it again") from error


def kind_of(tensors: Mapping[str, Tensor]) -> Kind | None:
    """What the names say, None for anything that is not a checkpoint of these.

    Raises:
        ConversionError: it is one that does not say what it means.
    """
    if not tensors:
        return None
    if any(_LAYER.fullmatch(name) for name in tensors):
        return "svft"
    if any("adaptive_weights" in name for name in tensors):
        raise ConversionError(
            "the file combines experts, and does not say whether their weights were normalised",
            "convert the experts; or combine their logits, and upload the sum as SVF with "
            '"vector": "z"',
        )
    numbered = all(_NUMBERED.fullmatch(name) for name in tensors)
    named = all(target_of(name) is not None and value.ndim == 1 for name, value in tensors.items())
    return "svf" if numbered or named else None


# ------------------------------------------------------------------------------------------- SVF


def convert_svf(
    tensors: Mapping[str, Tensor],
    decomposed: Mapping[str, Tensor] | None,
    basis: SpectralBasis,
    out: Path,
) -> str:
    """Write SVF logits as an adapter directory.

    Args:
        tensors: of ``policy_params*.pt`` or ``learnable_params*.pt``.
        decomposed: of ``…decomposed_params.pt``, when there is one.
        basis: of the base they were trained on.
        out: an existing folder.

    Returns:
        What it is, in a few words.

    Raises:
        ConversionError: they do not fit the base; names the tensor.
    """
    vectors = _svf_targets(tensors, basis)
    worst = 0.0
    basis.prepare(vectors)
    if decomposed is not None:
        worst = max(_vectors_error(t, v, decomposed, basis) for t, v in vectors.items())
    write_svf(out, vectors, basis=basis)
    checked = f"vectors within {worst:.1e}" if decomposed is not None else "vectors not compared"
    return f"svf, {len(vectors)} targets, {checked}"


def _svf_targets(tensors: Mapping[str, Tensor], basis: SpectralBasis) -> dict[Target, Tensor]:
    shape = basis.shape
    order = [Target(layer, module) for layer in range(shape.num_layers) for module in _MLP]
    found: dict[Target, Tensor] = {}
    for name, vector in tensors.items():
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            # The count is all that ties numbers to names.
            if len(tensors) != len(order):
                raise ConversionError(
                    f"the file has {len(tensors)} vectors, {shape.name} {len(order)} mlp weights",
                    "--base names the model they were trained on",
                )
            target = order[int(match[1])] if int(match[1]) < len(order) else None
        else:
            target = target_of(name)
        if target is None or target.layer >= shape.num_layers:
            raise ConversionError(f"{name} is no weight of {shape.name}", "check --base")
        k = min(shape.dims[target.module])
        if tuple(vector.shape) != (k,) or not bool(vector.isfinite().all()):
            raise ConversionError(
                f"{name} has shape {list(vector.shape)}, must be [{k}] and finite: {target} has "
                f"{k} singular values",
                "--base names the model they were trained on",
            )
        found[target] = vector
    return {target: found[target] for target in shape.targets() if target in found}


def _vectors_error(
    target: Target, vector: Tensor, decomposed: Mapping[str, Tensor], basis: SpectralBasis
) -> float:
    """``‖Δ' − Δ‖ / ‖W‖`` of what the vector does to the file's singular vectors and to ours."""
    name = f"{module_path(target)}.weight"
    own = basis.factors(target)
    theirs = []
    for part, mine in zip("USV", own, strict=True):
        given = decomposed.get(f"{name}.{part}")
        if given is None or given.shape != mine.shape:
            shown = "missing" if given is None else f"of shape {list(given.shape)}"
            raise ConversionError(
                f"{name}.{part} is {shown}, must have shape {list(mine.shape)}", "check --base"
            )
        theirs.append(given.double())
    ours = [part.double() for part in own]
    given, mine = (_svf_change(part[1], vector) for part in (theirs, ours))
    # ⟨Δ', Δ⟩ without forming either.
    alike = (theirs[0].T @ ours[0]) * (theirs[2].T @ ours[2])
    squared = given @ given + mine @ mine - 2 * (given @ alike @ mine)
    error = float(squared.clamp_min(0).sqrt() / ours[1].norm().clamp_min(1e-30))
    if not error <= VECTORS_MAX:
        raise ConversionError(
            f"{name}: on the file's singular vectors the adapter differs by {error:.1e} of W, must "
            f"be within {VECTORS_MAX:g}: {_rotation(alike.abs())}",
            "if --base is right, its singular values are too close here for SVF to be portable",
        )
    return error


def _svf_change(sigma: Tensor, logits: Tensor) -> Tensor:
    scaled = sigma * torch.sigmoid(logits).double()
    return scaled * (sigma.sum() / scaled.sum()) - sigma


def _rotation(alike: Tensor) -> str:
    own = alike.diagonal()
    worst = int(own.argmin())
    return f"component {worst} is only {float(own[worst]):.3f} of the base's, others are mixed in"


# ------------------------------------------------------------------------------------------ SVFT


def convert_svft(
    tensors: Mapping[str, Tensor],
    basis: SpectralBasis,
    weight_of: WeightOf,
    tensor_of: TensorOf,
    out: Path,
) -> str:
    """Write the SVFT modules of a trainer's checkpoint as an adapter directory.

    Args:
        tensors: of the whole checkpoint. What is not SVFT's must be the base's.
        basis, weight_of: the base it was trained on.
        tensor_of: any tensor of that base by its name.
        out: an existing folder.

    Returns:
        What it is, in a few words.

    Raises:
        ConversionError: it is not SVFT on this base, or cannot be said in the base's singular
            vectors; names the tensor.
    """
    modules: dict[Target, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            _check_untouched(name, value, tensor_of)
            continue
        target = target_of(f"{match[1].removeprefix('base_model.model.')}.weight")
        if target is None or target.layer >= basis.shape.num_layers:
            raise ConversionError(f"{name} is of no adaptable module", "check --base")
        modules.setdefault(target, {})[match[2]] = value
    entries: dict[Target, tuple[Tensor, Tensor, Tensor]] = {}
    worst = 0.0
    basis.prepare(modules)
    for target in basis.shape.targets():
        if target in modules:
            where = f"{module_path(target)}.svft_layer"
            change = _svft_change(where, modules[target], weight_of(target).detach().cpu().double())
            entries[target], error = _sparse(where, change, basis.factors(target))
            worst = max(worst, error)
    write_svft(out, entries, basis=basis)
    return f"svft, {len(entries)} targets, within {worst:.1e} of W"


def _check_untouched(name: str, value: Tensor, tensor_of: TensorOf) -> None:
    """Biases, norms, embeddings, heads: shared with everyone, so they must be the base's."""
    plain = name.removeprefix("base_model.model.")
    if plain.endswith(".rotary_emb.inv_freq"):
        return  # older checkpoints hold this constant
    base = tensor_of(plain)
    if base is None:
        raise ConversionError(
            f"{name} cannot be compared with the base, which has no {plain}",
            "--base must be the Hugging Face directory it was trained on",
        )
    # A base in 16 bits may have been trained on in 32, and the other way round.
    rounded = base.to(value.dtype)
    if base.shape != value.shape or not torch.equal(rounded, value):
        difference = "its shape" if base.shape != value.shape else "its values"
        raise ConversionError(
            f"{name} differs from the base's in {difference}: what was trained beside SVFT cannot "
            "share a base",
            _HINT,
        )


def _svft_change(where: str, parts: Mapping[str, Tensor], w: Tensor) -> Tensor:
    """``W_eff − W``, ``(d_out, d_in)`` float64."""
    needed = ("u", "v", "s_pre", "s", "gate", "s_row", "s_col")
    for part in needed:
        if part not in parts:
            raise ConversionError(f"{where}.{part} is missing", "give the trainer's checkpoint")
    n = parts["s_pre"].numel()
    count = parts["s"].numel()
    shapes: dict[str, tuple[int, ...]] = {
        "u": (w.shape[0], n),
        "v": (n, w.shape[1]),
        "s_pre": (n,),
        "s": (count,),
        "gate": (1,),
        "s_row": (count,),
        "s_col": (count,),
        "s_pre_row": (n,),
        "s_pre_col": (n,),
    }
    for part, value in parts.items():
        if part not in shapes or tuple(value.shape) != shapes[part]:
            wanted = list(shapes[part]) if part in shapes else "absent: it is not part of SVFT"
            raise ConversionError(
                f"{where}.{part} has shape {list(value.shape)}, must be {wanted}", "check --base"
            )
        if not bool(value.isfinite().all()):
            raise ConversionError(f"{where}.{part} is not finite", _HINT)
    for part in ("s_row", "s_col"):
        if count and not 0 <= int(parts[part].min()) <= int(parts[part].max()) < n:
            raise ConversionError(f"{where}.{part} must be within 0 and {n - 1}", _HINT)
    for part in ("s_pre_row", "s_pre_col"):
        if part in parts and not torch.equal(parts[part].long(), torch.arange(n)):
            raise ConversionError(f"{where}.{part} must count from 0 to {n - 1}", _HINT)
    inner = torch.diag(parts["s_pre"].double())
    places = (parts["s_row"].long(), parts["s_col"].long())
    gated = parts["s"].double() * torch.sigmoid(parts["gate"].double())
    inner.index_put_(places, gated, accumulate=True)
    change: Tensor = parts["u"].double() @ inner @ parts["v"].double() - w
    return change


def _sparse(
    where: str, change: Tensor, factors: Factors
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """``change`` in the base's singular vectors, and its error as part of ‖W‖."""
    u, sigma, v = (part.double() for part in factors)
    norm = sigma.norm().clamp_min(1e-30)
    m = u.T @ change @ v
    outside = float((change - u @ m @ v.T).norm() / norm)
    if outside > DROPPED_MAX:
        raise ConversionError(
            f"{where}: {outside:.1e} of W lies outside of W's own singular vectors, must be within "
            f"{DROPPED_MAX:g}: columns that fill up a smaller rank were trained, or --base is not "
            "what it was trained on",
            _HINT,
        )
    size, order = m.flatten().abs().sort()
    dropped = (size.square().cumsum(0).sqrt() <= DROPPED_MAX * norm).sum()
    kept = order[min(int(dropped), len(order) - 1) :].sort().values
    most = ENTRIES_PER_COMPONENT * len(sigma)
    if len(kept) > most:
        raise ConversionError(
            f"{where} takes {len(kept)} entries in the base's singular vectors, {most} is the "
            "limit: its u and v are rotated against them, as those of close singular values are, "
            "or rounded to 16 bits",
            _HINT,
        )
    values = m.flatten()[kept].float()
    left = m.clone()
    left.view(-1)[kept] -= values.double()
    error = float((left.norm().square() + (outside * norm).square()).sqrt() / norm)
    rows, columns = kept // len(sigma), kept % len(sigma)
    return (rows.int(), columns.int(), values), error
