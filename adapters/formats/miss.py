"""PEFT's MiSS, and Bone, its earlier name: ``ΔW[o, j] = D[j mod r, o]``, scale 1.

One tensor per module, ``miss_block`` (or ``bone_block``):

- default: ``D (r, d_out)``, any ``r ≤ d_in``, dividing it or not;
- ``mini``: ``(r, m)`` with ``m`` dividing ``d_out``; output ``o`` uses column ``o mod m``, so ``D``
  is it, tiled;
- ``bat``: ``(d_out/r, r, r)``, which multiplies the base weight and is refused.

Source: PEFT 0.14 to 0.21, ``tuners/miss`` and ``tuners/bone``.
"""

from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import Config, check_common, field, get_rank
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.spec import Dims, Target
from shoal.adapters.weights import AdapterWeights

_BAT = (
    "bat multiplies the base weights and cannot share a batch; merge it into a base with "
    "`shoal adapters convert --merge`"
)


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    mini_r = _mini_r(raw.config)
    rank = get_rank(raw.config, "r", 64)
    kind = "bone_block" if raw.config["peft_type"] == "BONE" else "miss_block"
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    num_bytes = 0
    for target in raw.targets:
        other = next(iter(raw.targets[target].values()))
        if kind not in raw.targets[target] or len(raw.targets[target]) != 1:
            raise AdapterRejected(
                other.name, f"peft_type {raw.config['peft_type']} holds one {kind} per module"
            )
        dims = context.shape.dims[target.module]
        # A few bytes of `mini` can stand for a tensor as large as the base's.
        num_bytes += rank * dims.d_out * other.tensor.dtype.itemsize
        if num_bytes > context.max_bytes:
            raise AdapterTooLarge(f"{other.name}: exceeds {context.max_bytes} bytes once expanded")
        tensors[target] = (_columns(raw.part(target, kind), rank, mini_r, dims),)
    return AdapterWeights("miss", "fold", tensors, dict.fromkeys(tensors, 1.0))


def _mini_r(config: Config) -> int | None:
    """Columns of ``mini``, None for the default mode."""
    mode = config.get("init_weights", True)
    if mode == "bat":
        raise AdapterRejected(field("init_weights"), _BAT)
    if mode == "mini" and config["peft_type"] == "MISS":
        return get_rank(config, "mini_r", 1)
    if mode is None or isinstance(mode, bool):
        return None
    raise AdapterRejected(field("init_weights"), "must be true, false or, for MISS, mini")


def _columns(named: NamedTensor, rank: int, mini_r: int | None, dims: Dims) -> Tensor:
    """``D (r, d_out)`` from the stored block."""
    if named.tensor.ndim == 3:
        raise AdapterRejected(named.name, _BAT)
    if rank > dims.d_in:
        raise AdapterRejected(named.name, f"r is {rank}, must be at most d_in {dims.d_in}")
    if mini_r is None:
        return check_shape(named, rank, dims.d_out)
    if dims.d_out % mini_r:
        raise AdapterRejected(
            named.name, f"mini_r {mini_r} must divide the module's {dims.d_out} outputs"
        )
    return check_shape(named, rank, mini_r).repeat(1, dims.d_out // mini_r)


FORMAT = Format(
    name="miss",
    markers=frozenset({"miss_block", "bone_block"}),
    kinds=frozenset({"miss_block", "bone_block"}),
    peft_types=frozenset({"MISS", "BONE"}),
    read=_read,
)
