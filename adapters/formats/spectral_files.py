"""What the spectral formats, `svf` and `svft`, have in common: whose singular vectors they mean.

A file holds numbers per singular component of a base's weights, and not the vectors. Which base
that is, it says by ``basis: {"id": "svd-…"}`` in its config, or by probes (``svd_probe``), or both;
what is there must fit, and one of them must be there. Nothing is guessed from shapes.
"""

import torch
from torch import Tensor

from shoal.adapters.basis import PROBE_COLUMNS
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.families.spectral import COMPONENTS_MAX
from shoal.adapters.formats.base import RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import Config, field
from shoal.adapters.formats.container import printable
from shoal.adapters.formats.keys import tensor_name
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.spectral_probe import delta_probes
from shoal.adapters.weights import AdapterWeights

PROBE = "svd_probe"
# Allowed relative difference of a probe, as of LoRA-XS'; or what its dtype resolves, if that is
# more. A flipped or swapped column differs by about 1.
PROBE_ERROR_MAX = 1e-3
# What an entry takes in memory: two int32 and a float32.
ENTRY_BYTES = 12


def spectral_basis(raw: RawAdapter, context: ReadContext) -> SpectralBasis:
    """The base's singular vectors, once nothing speaks against these being the file's.

    Raises:
        AdapterRejected: there are none at hand, the config names another base's, or it names none
            and a module has no probe.
    """
    basis = context.spectral
    if basis is None:
        raise AdapterRejected(
            field("peft_type"),
            "needs the base's singular vectors, which are not at hand here (a server keeps them "
            "within --spectral-memory)",
        )
    told = _told_id(raw.config)
    for target, parts in raw.targets.items():
        if told != basis.id and PROBE not in parts:
            raise AdapterRejected(
                tensor_name(target, PROBE),
                f"is missing: nothing says that the file was made for this base ({basis.id})",
            )
        if min(context.shape.dims[target.module]) > COMPONENTS_MAX:
            raise AdapterRejected(
                str(target), f"spectral adapters have at most {COMPONENTS_MAX} components"
            )
    return basis


def check_probe(raw: RawAdapter, target: Target, expected: Tensor, scale: Tensor) -> None:
    """Compare a target's probe, if it has one.

    Args:
        expected: ``(…, PROBE_COLUMNS)``, what the base's singular vectors or values give.
        scale: ``(…, 1)``, what differences are relative to.

    Raises:
        AdapterRejected: another shape, or a value that differs; names the tensor.
    """
    named = raw.targets[target].get(PROBE)
    if named is None:
        return
    given = check_shape(named, *expected.shape).double()
    errors = ((given - expected.double()).abs() / scale.double().clamp_min(1e-30)).reshape(-1)
    worst = int(errors.argmax())
    allowed = max(PROBE_ERROR_MAX, torch.finfo(named.tensor.dtype).eps)
    if not float(errors[worst]) <= allowed:
        where = "" if expected.ndim == 1 else f" at component {worst // PROBE_COLUMNS}"
        raise AdapterRejected(
            named.name,
            f"differs by {float(errors[worst]):.1e}{where}, must be within {allowed:.0e}: "
            "the file was made for another base, or with other singular vectors of it",
        )


def check_bytes(name: str, entries: int, context: ReadContext) -> None:
    """AdapterTooLarge when so many entries exceed what an adapter may take."""
    if entries * ENTRY_BYTES > context.max_bytes:
        raise AdapterTooLarge(f"{name}: exceeds {context.max_bytes} bytes once expanded")


def spectral_weights(
    name: str, tensors: dict[Target, tuple[Tensor, ...]], basis: SpectralBasis
) -> AdapterWeights:
    """The adapter of these entries between the vectors of ``basis``, with what tells them again."""
    probes = delta_probes(tensors, basis)
    scales = dict.fromkeys(tensors, 1.0)
    return AdapterWeights(name, "spectral", tensors, scales, basis.id, probes=probes)


def diagonal(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``diag(values)`` as the entries of ``AdapterWeights``."""
    index = torch.arange(len(values), dtype=torch.int32)
    return index, index.clone(), values.float()


def _told_id(config: Config) -> str | None:
    """What the config calls the basis, None when it leaves that to the probes."""
    told = config.get("basis")
    if told is None:
        return None
    name = told.get("id") if isinstance(told, dict) else None
    if not isinstance(name, str):
        raise AdapterRejected(field("basis"), "must be an object with the string id")
    return printable(name)
