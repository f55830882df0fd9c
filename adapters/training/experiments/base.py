"""The base as a Hugging Face directory, so that it is read in a second by each of many runs.

Dequantising a ``.gguf`` file and rebuilding its tokenizer takes longer than training an adapter.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from shoal.adapters.training.loading import load_base

log = logging.getLogger(__name__)


def directory_of(base: Path, folder: Path) -> Path:
    """``base`` itself when it is a directory; otherwise ``folder``, which is made once.

    Weights are kept in float32, as they were dequantised.

    Raises:
        BaseRejected: as ``load_base``.
    """
    if base.is_dir() or (folder / "config.json").is_file():
        return base if base.is_dir() else folder
    log.info("converting base=%s", base)
    loaded = load_base(base, torch.device("cpu"), "float32")
    making = folder.with_name(folder.name + ".new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    loaded.tokenizer.save_pretrained(making)
    config = loaded.model.config.to_dict()
    config.pop("quantization_config", None)
    tied = config.get("tie_word_embeddings", False)
    weights = {
        name: tensor.contiguous()
        for name, tensor in loaded.model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, making / "model.safetensors", metadata={"format": "pt"})
    config["dtype"] = "float32"
    config["architectures"] = [type(loaded.model).__name__]
    (making / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder
