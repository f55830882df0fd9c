"""Loading a base model: a Hugging Face directory, a GGUF file, or random numbers of its shapes.

Every tensor the config asks for is found exactly once, or the load fails and says which is not.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.adapters.formats.keys import module_path
from shoal.adapters.spec import Target
from shoal.adapters.weights import WeightOf
from shoal.server.model.config import ModelConfig, ModelError
from shoal.server.model.decoder import Decoder
from shoal.server.model.dummy import random_decoder
from shoal.server.model.gguf import GGUFFile
from shoal.server.model.pull import resolve_model as resolve_model

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "dummy"]

# Tensors of a checkpoint that a text model does not need.
IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.", "rotary_emb.inv_freq")


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a model directory or ``.gguf`` file, without its weights.

    Raises:
        ModelError: nothing there, or not a model that can be served.
    """
    if path.suffix == ".gguf":
        return GGUFFile(path).config()
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(f"{path} is neither a .gguf file nor a directory with a config.json")
    generation = path / "generation_config.json"
    return ModelConfig.from_hf(
        _read_json(config), _read_json(generation) if generation.is_file() else None
    )


def default_dtype(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """``--dtype auto``: float32 on a CPU, else the checkpoint's 16-bit type (bfloat16 if none)."""
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.float16 if config.dtype == "float16" else torch.bfloat16


def load_model(
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    load_format: LoadFormat = "auto",
    spare_rows: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load a base model, tensor by tensor, straight to its device and dtype.

    Args:
        path: a directory with ``config.json`` and safetensors files, or a ``.gguf`` file (which is
            dequantised: it is served in ``dtype``).
        device: where the model runs.
        dtype: what it runs in.
        load_format: ``dummy`` fills the shapes with seeded random numbers and reads no weights.
        spare_rows: see ``Decoder``.
        progress: called with (tensors loaded, tensors in all); not for random ones.

    Raises:
        ModelError: the model is not supported, or a tensor is missing, unknown or mis-shaped.
    """
    if load_format == "dummy":
        return random_decoder(read_config(path), device, dtype, spare_rows=spare_rows)
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        config, tensors = file.config(), file.tensors()
    else:
        config = read_config(path)
        tensors = _safetensors(path, torch.device(device))
    decoder = Decoder(config, device=device, dtype=dtype, spare_rows=spare_rows)
    _fill(decoder, tensors, path, progress)
    logger.info("loaded %s from %s on %s in %s", config.architecture, path, device, dtype)
    return decoder


def exact_weight_of(decoder: Decoder, path: Path) -> WeightOf:
    """``decoder.weight_of`` as the checkpoint has the weights, before ``decoder`` rounded them.

    For what is derived from the weights and outlives the process, above all bases: it must not
    depend on the dtype that one server happens to run in. Where loading rounded, each call reads
    its weight from the checkpoint again: nothing is kept.

    Args:
        decoder: made of ``path`` by ``load_model``.

    Returns:
        Weights on the decoder's device, in the dtype they are stored in; they raise OSError when
        the checkpoint cannot be read any more.
    """
    if decoder.dtype == torch.float32 or _is_stored_in(path, decoder.dtype):
        return decoder.weight_of

    @functools.cache
    def readers() -> dict[str, Callable[[], Tensor]]:
        if path.suffix == ".gguf":
            return GGUFFile(path).readers()
        return {
            _text_name(name): functools.partial(_read_tensor, file, name)
            for file in _safetensors_files(path)
            for name in _names(file)
        }

    def weight_of(target: Target) -> Tensor:
        try:
            return readers()[f"{module_path(target)}.weight"]().to(decoder.device)
        except (ModelError, SafetensorError) as error:
            raise OSError(str(error)) from error

    return weight_of


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _is_stored_in(path: Path, dtype: torch.dtype) -> bool:
    """Whether every adaptable linear of a checkpoint has this dtype; GGUF is dequantised."""
    if path.suffix == ".gguf":
        return False
    wanted = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    for file in _safetensors_files(path):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name.endswith("_proj.weight") and opened.get_slice(name).get_dtype() != wanted:
                    return False
    return True


def _fill(
    decoder: Decoder,
    tensors: Iterator[tuple[str, Tensor]],
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    missing = set(decoder.weight_shapes())
    total = len(missing)
    unknown: list[str] = []
    tied = decoder.config.tie_word_embeddings
    for name, tensor in tensors:
        name = _text_name(name)
        if name in missing:
            decoder.load_weight(name, tensor)
            missing.remove(name)
            if progress is not None:
                progress(total - len(missing), total)
        elif not (tied and name == "lm_head.weight") and not any(p in name for p in IGNORED_PARTS):
            unknown.append(name)
    if missing:
        raise ModelError(f"{path} lacks {_some(sorted(missing))}")
    if unknown:
        raise ModelError(
            f"{path} has {_some(unknown)}, which a {decoder.config.architecture} model with its "
            "config.json has no use for"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensor{'s'[: len(names) > 1]} ({shown}{', …' if len(names) > 3 else ''})"


def _text_name(name: str) -> str:
    """A multimodal checkpoint's name of a text tensor -> the text model's own."""
    if name.startswith("language_model."):  # transformers 4
        return name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)  # transformers 5


def _safetensors(path: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for file in _safetensors_files(path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map")
        files = [path / name for name in sorted(set(weight_map.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing; weights are read from safetensors files only")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
