"""From uploaded files to validated ``AdapterWeights``: the only way in for foreign bytes.

Owns which files are accepted and in which order things are checked. What is refused leaves nothing
behind: the one side effect, keeping a further basis, is a format's last step.
"""

from collections.abc import Mapping
from pathlib import Path

from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats import (
    adalora,
    dora,
    loha,
    lokr,
    lora,
    lora_xs,
    miss,
    svf,
    svft,
    tinylora,
    vera,
)
from shoal.adapters.formats.base import (
    PRODUCT_RANK_MAX,
    FormatRegistry,
    ReadContext,
    registry_of,
)
from shoal.adapters.formats.config_fields import CONFIG_FILE
from shoal.adapters.formats.container import printable, read_json, read_tensors
from shoal.adapters.spec import BaseShape
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import AdapterWeights, WeightOf

WEIGHTS_FILE = "adapter_model.safetensors"

# Files of LoRA-XS, AdaLoRA and DoRA contain LoRA's tensors, so LoRA is tried last.
FORMATS: FormatRegistry = registry_of(
    [
        lora_xs.FORMAT,
        adalora.FORMAT,
        dora.FORMAT,
        vera.FORMAT,
        tinylora.FORMAT,
        miss.FORMAT,
        loha.FORMAT,
        lokr.FORMAT,
        svf.FORMAT,
        svft.FORMAT,
        lora.FORMAT,
    ]
)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_adapter(
    files: Mapping[str, Path],
    *,
    shape: BaseShape,
    weight_of: WeightOf,
    bases: BasisStore,
    canonical: Basis,
    max_bytes: int,
    max_bases: int,
    max_rank: int = PRODUCT_RANK_MAX,
    spectral: SpectralBasis | None = None,
) -> AdapterWeights:
    """Read and validate an adapter.

    Args:
        files: the client's file names and where their bytes are: exactly ``adapter_config.json``
            and ``adapter_model.safetensors``.
        shape: the base.
        weight_of: the base's weights; LoRA-XS files are compared with them.
        bases: known uploaded bases. A file's own basis may be added, durably, before this returns.
        canonical: the base's own basis.
        max_bytes: limit for all files together, and for the tensors they stand for.
        max_bases: how many uploaded bases there may be; further ones are served as ``lora``.
        max_rank: of the explicit factors of LoHa and LoKr.
        spectral: the base's singular vectors; without them SVF and SVFT are refused.

    Returns:
        Weights that own their memory, on the CPU.

    Raises:
        AdapterRejected: cannot be served; names the file, field or tensor, and the rule.
        AdapterTooLarge: over a byte limit.
    """
    _check_names(files)
    size = sum(path.stat().st_size for path in files.values())
    if size > max_bytes:
        raise AdapterTooLarge(f"the files hold {size} bytes, the limit is {max_bytes}")
    config = read_json(files[CONFIG_FILE], CONFIG_FILE)
    path = files[WEIGHTS_FILE]
    with path.open("rb") as file:
        tensors, _ = read_tensors(file, path.stat().st_size, WEIGHTS_FILE, empty=True)
    context = ReadContext(
        shape, weight_of, bases, canonical, max_bases, max_bytes, max_rank, spectral
    )
    return FORMATS.read(config, tensors, context)


def adapter_files(directory: Path) -> dict[str, Path]:
    """The two files of an adapter directory, for `read_adapter`.

    Looks one level down when there is no config at the top and exactly one sub-folder has one:
    PEFT saves an adapter with another name than ``default`` to a folder of that name. Other files
    (metrics, a README, training state) are left out; a pickle is included when it is all there is,
    so that its refusal says what to do.

    Raises:
        AdapterRejected: there is no ``adapter_config.json``.
    """
    folder = directory
    if not (folder / CONFIG_FILE).is_file():
        nested = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
        if len(nested) != 1:
            raise AdapterRejected(CONFIG_FILE, f"is missing in {directory.name}")
        folder = nested[0]
    found = {CONFIG_FILE: folder / CONFIG_FILE}
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        return found | {WEIGHTS_FILE: weights}
    pickles = sorted(path for path in folder.glob("adapter_model.*") if path.suffix in _PICKLES)
    return found | {path.name: path for path in pickles[:1]}


def _check_names(files: Mapping[str, Path]) -> None:
    for name in files:
        shown = printable(name)
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise AdapterRejected(f"file {shown!r}", "must be a plain name without a path")
        if name.lower().endswith(_PICKLES):
            raise AdapterRejected(
                f"file {shown}",
                f"is a pickle, which can run code and is not read; make {WEIGHTS_FILE} of it with "
                "`shoal adapters convert`",
            )
        if name not in (CONFIG_FILE, WEIGHTS_FILE):
            raise AdapterRejected(
                f"file {shown}", f"is not part of an adapter; send {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise AdapterRejected(f"file {name}", "is missing")
