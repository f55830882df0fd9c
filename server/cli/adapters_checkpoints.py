"""``shoal adapters convert`` of the SVF and SVFT authors' own checkpoints.

Owns how such a file is recognised (it has no ``adapter_config.json`` beside it) and what of the
base it is compared with; ``shoal.adapters.converting_spectral`` does the work.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.server.cli import adapters_base

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from torch import Tensor

    from shoal.adapters.converting_spectral import TensorOf


def convert(args: argparse.Namespace, out: Path) -> str | None:
    """Fill ``out`` and say what it is; None, and nothing done, when the source is no such file.

    Raises:
        ConversionError: it is one and cannot be converted.
        ModelError, RegistryError, OSError: as `adapters_base.offline_base`.
    """
    from shoal.adapters import converting_spectral as spectral
    from shoal.adapters.formats.config_fields import CONFIG_FILE

    source: Path = args.source
    if not source.is_file() or source.with_name(CONFIG_FILE).is_file():
        return None
    tensors = spectral.read_checkpoint(source)
    kind = spectral.kind_of(tensors)
    if kind is None:
        return None
    with adapters_base.offline_base(args, need_basis=False, need_spectral=True) as base:
        assert base.spectral is not None
        if kind == "svft":
            tensor_of = _tensor_of(base)
            return spectral.convert_svft(tensors, base.spectral, base.weight_of, tensor_of, out)
        beside = sorted(source.parent.glob("*decomposed_params.pt"))
        decomposed = spectral.read_checkpoint(beside[0]) if len(beside) == 1 else None
        return spectral.convert_svf(tensors, decomposed, base.spectral, out)


def _tensor_of(base: adapters_base.OfflineBase) -> "TensorOf":
    """Any tensor of a base in a Hugging Face directory; of a GGUF none."""
    from shoal.adapters.merging import Checkpoint

    if not base.path.is_dir():
        return lambda name: None
    checkpoint = Checkpoint(base.path, base.shape)

    def tensor_of(name: str) -> "Tensor | None":
        found = checkpoint.tensor(name)
        # A tied head is in some files and not in others.
        return (
            checkpoint.tensor("model.embed_tokens.weight")
            if found is None and name == "lm_head.weight"
            else found
        )

    return tensor_of
