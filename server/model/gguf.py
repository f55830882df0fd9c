"""Reading a base model from a GGUF file: configuration, and weights under Hugging Face's names.

Quantised tensors are dequantised one at a time by the ``gguf`` package; what llama.cpp's converter
changed (row order of q and k, norms stored with their ``1 +``) is undone here. The header is parsed
here too: the package's reader takes seconds for a vocabulary.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from shoal.server.model.config import ModelConfig, ModelError

# GGUF's general.architecture -> Hugging Face's model_type. Mistral files call themselves llama.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {  # Gemma 2 and 3, where these differ
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # metadata type -> struct
_STRING, _ARRAY = 8, 9
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_DIVISORS = "rope_freqs.weight"


class _TensorInfo(NamedTuple):
    """Where a tensor lies; ``dims`` has the fastest-moving dimension first."""

    dims: tuple[int, ...]
    quantization: int
    offset: int


class GGUFFile:
    """One opened file; the tensors stay memory-mapped until they are asked for.

    Attributes:
        metadata: the header's key-value pairs.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            ModelError: no such file, not GGUF, or an architecture that cannot be served.
        """
        self.path = path
        try:
            self._bytes = np.memmap(path, mode="r")
            header = _Header(self._bytes.data)
        except (OSError, ValueError, struct.error) as error:
            raise ModelError(f"{path} cannot be read as GGUF: {error}") from error
        self.metadata = header.metadata
        self._tensors = header.tensors
        self._data_start = header.end
        self.architecture = str(self._field("general.architecture", required=True))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: "
                f"{', '.join(sorted(ARCHITECTURES))}"
            )

    def config(self) -> ModelConfig:
        """The configuration, from the file's metadata."""
        return ModelConfig.from_hf(self._hf_config())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(Hugging Face name, tensor)``, float32, one at a time.

        A tensor whose name is not known is yielded under its own name.
        """
        for name in self._tensors:
            if name != _ROPE_DIVISORS:
                yield self._hf_name(name), self._tensor(name)

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """What reads each tensor, by the name that ``tensors`` gives it."""
        return {self._hf_name(name): partial(self._tensor, name) for name in self._tensors}

    def _tensor(self, name: str) -> Tensor:
        data = self._read(name)
        # Memory-mapped arrays are read-only, which torch does not accept silently.
        return torch.from_numpy(data if data.flags.writeable else np.array(data))

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor as Hugging Face has it, dequantised to float32."""
        tensor = self._tensors[name]
        try:
            kind = GGMLQuantizationType(tensor.quantization)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            row, *outer = tensor.dims
            if row % block:
                raise ValueError(f"rows of {row} do not divide into blocks of {block}")
            shape = (*reversed(outer), row // block * block_bytes)
            start = self._data_start + tensor.offset
            raw = self._bytes[start : start + math.prod(shape)].reshape(shape)
            with np.errstate(all="ignore"):  # what a damaged file holds is not worth a warning
                return self._as_trained(name, dequantize(raw, kind))
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ModelError(f"{self.path}: tensor {name} cannot be read: {error}") from error

    def _as_trained(self, name: str, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Undo what llama.cpp's converter does to the values of a tensor."""
        if self.architecture == "llama" and ".attn_q." in name:
            return _unpermute(data, self._integer("attention.head_count"))
        if self.architecture == "llama" and ".attn_k." in name:
            return _unpermute(data, self._kv_heads())
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return data - 1.0
        return data

    def _hf_name(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        if match is None:
            return name
        layer, part, kind = match.groups()
        if layer is None:
            return f"{_GLOBAL[part]}.{kind}" if part in _GLOBAL else name
        sandwich = self.architecture in ("gemma2", "gemma3")
        table = _LAYER | _SANDWICH if sandwich else _LAYER
        return f"model.layers.{layer}.{table[part]}.{kind}" if part in table else name

    def _hf_config(self) -> dict[str, Any]:
        """The metadata, spelled as a Hugging Face ``config.json``."""
        arch = self.architecture
        hidden = self._integer("embedding_length")
        heads = self._integer("attention.head_count")
        head_dim = self._integer("attention.key_length", hidden // heads)
        rotated = self._integer("rope.dimension_count", head_dim)
        tokens = self._field("tokenizer.ggml.tokens") or ()
        ends = [self._field(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
        config: dict[str, Any] = {
            "model_type": ARCHITECTURES[arch],
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads(),
            "head_dim": head_dim,
            "vocab_size": self._integer("vocab_size", len(tokens)),
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._real("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "rope_theta": self._real("rope.freq_base", 10_000.0),
            "partial_rotary_factor": rotated / head_dim,
            "eos_token_id": [end for end in ends if isinstance(end, int)],
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
        }
        config["rope_scaling"] = self._rope_scaling()
        if arch in ("gemma2", "gemma3"):
            config |= self._gemma(hidden // heads, head_dim, self._integer("block_count"))
        return config

    def _rope_scaling(self) -> dict[str, Any]:
        kind = self._arch_field("rope.scaling.type")
        if kind in (None, "none"):
            scaling: dict[str, Any] = {"rope_type": "default"}
        else:
            original = self._integer("rope.scaling.original_context_length", 0)
            scaling = {
                "rope_type": kind,
                "factor": self._real("rope.scaling.factor", 0.0),
                "original_max_position_embeddings": original,
            }
        if _ROPE_DIVISORS in self._tensors:
            scaling["divisors"] = [float(v) for v in self._read(_ROPE_DIVISORS)]
        return scaling

    def _gemma(self, even_dim: int, head_dim: int, layers: int) -> dict[str, Any]:
        # The query scale is not in the file. All sizes use head_dim but the two 27B models, which
        # only their depth identifies; llama.cpp tells them apart in the same way.
        is_27b = (self.architecture, layers) in (("gemma2", 46), ("gemma3", 62))
        config: dict[str, Any] = {
            "sliding_window": self._integer("attention.sliding_window"),
            "query_pre_attn_scalar": even_dim if is_27b else head_dim,
        }
        pattern = self._arch_field("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            kinds = ("full_attention", "sliding_attention")
            config["layer_types"] = [kinds[bool(slides)] for slides in pattern]
        elif pattern is not None:
            config["sliding_window_pattern"] = self._integer("attention.sliding_window_pattern")
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self._arch_field(field) is not None:
                config[field] = self._real(field)
        return config

    def _kv_heads(self) -> int:
        return self._integer("attention.head_count_kv", self._integer("attention.head_count"))

    def _integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of this architecture, or ``default`` where the file has none."""
        value = self._arch_field(key, required=default is None)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or value <= 0:
            raise self._invalid(key, value, "a positive integer")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._arch_field(key, required=default is None)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._invalid(key, value, "a positive number")
        return float(value)

    def _invalid(self, key: str, value: Any, rule: str) -> ModelError:
        return ModelError(f"{self.path}: {self.architecture}.{key} is {value!r}, expected {rule}")

    def _arch_field(self, key: str, *, required: bool = False) -> Any:
        return self._field(f"{self.architecture}.{key}", required=required)

    def _field(self, key: str, *, required: bool = False) -> Any:
        if required and key not in self.metadata:
            raise ModelError(f"{self.path}: metadata {key} is missing")
        return self.metadata.get(key)


class _Header:
    """Parses what stands before the tensor data. Raises ValueError or struct.error."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0
        if bytes(data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not 2 or 3 (or it is big-endian)")
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string()
            self.metadata[key] = self._value(self._number("I"))
        self.tensors: dict[str, _TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._string()
            dims = self._numbers("Q", self._number("I"))
            kind, offset = self._number("I"), self._number("Q")
            self.tensors[name] = _TensorInfo(dims, kind, offset)
        alignment = int(self.metadata.get("general.alignment", 32))
        self.end = -(-self._at // alignment) * alignment

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}")
        if count * size > len(self._data) - self._at:
            raise ValueError("the header ends early")
        values = struct.unpack_from(f"<{count}{code}", self._data, self._at)
        self._at += count * size
        return values

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _string(self) -> str:
        length = self._number("Q")
        if length > len(self._data) - self._at:
            raise ValueError("the header ends early")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < 4:
            item, count = self._number("I"), self._number("Q")
            if item in _NUMBERS:
                return list(self._numbers(_NUMBERS[item], count))
            return [self._value(item, depth + 1) for _ in range(count)]
        raise ValueError(f"metadata type {kind} is not known")


def _unpermute(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's row order of rotated heads.

    GGUF's llama has rotation pairs as neighbours ``(2i, 2i + 1)``, Hugging Face as halves
    ``(i, i + d/2)``. Works on weights ``(heads * d, n)`` and biases ``(heads * d,)``.
    """
    paired = data.reshape(heads, -1, 2, *data.shape[1:])  # (heads, d/2, 2, ...)
    return paired.swapaxes(1, 2).reshape(data.shape)
