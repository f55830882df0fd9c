"""Fuzzing of everything that reads an upload: ``python tests/adapters/fuzz_reading.py``.

Starts from valid files of every golden case and of every format that has none, changes config
fields, tensors, header entries and bytes, and takes the result through reading, packing, the
record and ``AdapterLibrary.check``. It must be refused by an error of ours, in time and within
bounded memory, leaving nothing behind; or be accepted, and then change the base by exactly what
`reading_oracle.py` reads in the same files. Every example depends on its seed alone.

``--seconds 600`` is how long; ``--seed N`` where to start; a finding is printed, smallest form
first, with its files in ``--keep``, and ends the batch of examples it was in, not the run.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.adapters import reading_oracle as oracle

from shoal.adapters.basis import Basis, BasisStore, compute_basis
from shoal.adapters.deltas import BaseParts, changes
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats import writing
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary
from shoal.adapters.packing import make_spec, pack_adapter
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import AdapterWeights

GOLDEN = Path(__file__).parent / "golden"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS_MAX = 5.0
MEMORY_MAX = 192 << 20  # of one example; a header of 4 MiB takes up to 100 MB once parsed
MAX_BYTES = 1 << 20
Config = dict[str, Any]
Tensors = dict[str, Tensor]


# --------------------------------------------------------------------------------- what is read


@dataclass
class Case:
    """A valid adapter, or a golden one that is refused."""

    name: str
    config: Config
    tensors: Tensors


class Base:
    """The golden base, with all that reading may ask of it, and a library over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stored = load_file(GOLDEN / "base.safetensors")
        self.weights = {target_of(name): tensor for name, tensor in stored.items()}
        dims = {module: Dims(*self.weights[Target(0, module)].shape) for module in MODULES}
        self.shape = BaseShape("tiny", "d" * 64, 2, dims)
        self.canonical = compute_basis(self.weights.__getitem__, self.shape, 8)
        self.spectral = SpectralBasis(self.weights.__getitem__, self.shape, folder / "svd")
        self.library = AdapterLibrary.open(
            registry_url=f"sqlite:///{folder}/registry.db",
            store_url=str(folder / "store"),
            shape=self.shape,
            weight_of=self.weights.__getitem__,
            canonical=self.canonical,
            bases=BasisStore(folder / "known"),
            host=HostTier(1 << 24),
            on_basis=lambda basis: None,
            dtype=torch.float32,
            reserved_names=frozenset(),
            max_upload_bytes=MAX_BYTES,
            shipped=None,
            spectral=self.spectral,
        )
        self.world = oracle.World(
            {target: weight.double() for target, weight in self.weights.items()},
            lambda basis_id, target: self.canonical.factors[target].double(),
            self._singular,
        )

    def _singular(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, v = self.spectral.factors(target)
        return u.double(), sigma.double(), v.double()

    def read(self, directory: Path, bases: BasisStore, max_bases: int) -> AdapterWeights:
        return read_adapter(
            adapter_files(directory),
            shape=self.shape,
            weight_of=self.weights.__getitem__,
            bases=bases,
            canonical=self.canonical,
            max_bytes=MAX_BYTES,
            max_bases=max_bases,
            spectral=self.spectral,
        )


def target_of(path: str) -> Target:
    parts = path.split(".")
    return Target(int(parts[2]), parts[4])


def cases(base: Base) -> list[Case]:
    """Every golden case, and the formats and fields that those leave out."""
    found = []
    for directory in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        found.append(load(directory, directory.name))
    by_name = {case.name: case for case in found}
    lora, dora = by_name["lora_partial"], by_name["lora_dora"]
    for name, source, more in (
        ("olora", lora, {"init_lora_weights": "olora"}),
        ("pissa_rs", lora, {"init_lora_weights": "pissa", "use_rslora": True}),
        ("milora", lora, {"base_correction": {"method": "milora"}}),
        ("olora_told", lora, {"base_correction": {"method": "olora", "r": 3}}),
        ("dora_pissa", dora, {"init_lora_weights": "pissa"}),
        ("dora_milora", dora, {"base_correction": {"method": "milora", "r": 1}}),
        ("xs_rs", by_name["xs_new_key"], {"use_rslora": True}),
        ("tiny_drawn", by_name["tinylora"], {"save_projection": False}),
    ):
        found.append(Case(name, source.config | more, dict(source.tensors)))
    for name in [name for name in found[-1].tensors if "tinylora_P" in name]:
        del found[-1].tensors[name]
    return found + written(base)


def written(base: Base) -> list[Case]:
    """Our own layouts, by our own writers."""
    draw = torch.Generator().manual_seed(5)
    chosen = [t for t in base.shape.targets() if t.module in ("q_proj", "k_proj", "down_proj")]

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    folder = base.folder / "written"
    latents = {target: randn(3, 3) for target in chosen}
    writing.write_compact_lora_xs(
        folder / "compact", latents, alpha=6, rank=3, basis=base.canonical, shape=base.shape
    )
    sizes = {target: min(base.shape.dims[target.module]) for target in chosen}
    vectors = {target: randn(size) for target, size in sizes.items()}
    writing.write_svf(folder / "svf", vectors, basis=base.spectral)
    settings_z = {"vector": "z", "renormalise": False}
    writing.write_svf(folder / "svf_z", vectors, basis=base.spectral, settings=settings_z)
    index = torch.arange(5).int()
    entries = {target: (index, index.flip(0), randn(5)) for target in chosen}
    gates = {target: randn(1) for target in chosen}
    kept = {target: randn(6).abs() for target in chosen}
    writing.write_svft(folder / "svft", entries, basis=base.spectral, gates=gates)
    writing.write_svft(folder / "svft_less", entries, basis=base.spectral, s_pre=kept)
    return [load(path, path.name) for path in sorted(folder.iterdir())]


def load(directory: Path, name: str) -> Case:
    files = adapter_files(directory)
    return Case(name, json.loads(files[CONFIG].read_text()), load_file(files[WEIGHTS]))


# ------------------------------------------------------------------------------------- mutating

PATHS = [
    f"model.layers.{layer}.{block}.{module}"
    for layer in (0, 1)
    for block, modules in (("self_attn", MODULES[:4]), ("mlp", MODULES[4:]))
    for module in modules
]
KEYS = st.sampled_from(
    [
        *MODULES, *PATHS, "^q_proj", "^model.layers.0.self_attn.q_proj", r"layers\.[01]\..*", ".*",
        r"^model\.layers\.\d\.mlp\..*_proj", "proj", "q", "", ".", "a|b", "(a+)+$", "[0-9]*",
        "x" * 200,
    ]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 16, -1, -8, 0.5, 1.5, 2.0, 16.97, 1e-30, 1e30, 1e308, 5e-324,
        10**400, 1 << 31, (1 << 31) - 1, 1 << 63, 12345,
    ]
)  # fmt: skip
WORDS = st.sampled_from(
    [
        "", "none", "all", "lora_only", "mini", "bat", "input", "output", "logits", "z", "layers",
        "pissa", "olora", "milora", "eva", "gaussian", "corda", "loftq", "pissa_niter_4", "\ud800",
        "LORA", "LORA_XS", "ADALORA", "VERA", "TINYLORA", "MISS", "BONE", "LOHA", "LOKR", "SVF",
        "SVFT", "IA3", "all-linear", r".*\.q_proj", "q_proj", "a\x00b",
    ]
)  # fmt: skip
PATTERNS = st.dictionaries(KEYS, NUMBERS, max_size=3)
METHODS = st.sampled_from(["pissa", "olora", "milora"])
CORRECTIONS = st.fixed_dictionaries({"method": METHODS}, optional={"r": st.integers(1, 9)}) | (
    st.fixed_dictionaries({"method": WORDS}, optional={"r": NUMBERS | st.none(), "x": NUMBERS})
)
MASKS = st.dictionaries(
    st.sampled_from([f"{path}.lora_E" for path in PATHS]),
    st.lists(st.booleans(), max_size=3) | NUMBERS,
    max_size=3,
)
# Hypothesis likes the ends of ranges of integers; this is what it says.
RARELY = st.sampled_from([False] * 19 + [True])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | KEYS, inner, max_size=3),
    max_leaves=6,
)
# What decides a scale or a meaning, so drawn more often than other fields.
DECIDING = {
    "r": NUMBERS, "lora_alpha": NUMBERS, "alpha": NUMBERS, "init_r": NUMBERS, "mini_r": NUMBERS,
    "u": NUMBERS, "weight_tying": NUMBERS, "max_mult": NUMBERS, "projection_prng_key": NUMBERS,
    "projection_seed": NUMBERS, "use_rslora": st.booleans(), "use_dora": st.booleans(),
    "save_projection": st.booleans(), "renormalise": st.booleans(), "vector": WORDS,
    "rank_pattern": PATTERNS | MASKS, "alpha_pattern": PATTERNS, "peft_type": WORDS,
    "init_lora_weights": WORDS | st.booleans(), "init_weights": WORDS | st.booleans(),
    "base_correction": CORRECTIONS, "shard": WORDS, "bias": WORDS, "basis": JSON,
    "target_modules": st.lists(KEYS, max_size=3) | WORDS, "exclude_modules": st.lists(KEYS) | WORDS,
    "layers_to_transform": NUMBERS | st.lists(NUMBERS, max_size=2), "layers_pattern": WORDS,
    "modules_to_save": JSON, "fan_in_fan_out": JSON, "layer_replication": JSON,
    "target_parameters": JSON, "trainable_token_indices": JSON, "lora_bias": JSON,
    "use_qalora": JSON, "use_bdlora": JSON, "alora_invocation_tokens": JSON, "kasa_config": JSON,
    "monteclora_config": JSON, "velora_config": JSON, "arrow_config": JSON,
    "megatron_config": JSON,
}  # fmt: skip
# What most files stay valid with.
SCALING = sorted(
    {"lora_alpha", "alpha", "use_rslora", "alpha_pattern", "max_mult", "renormalise"}
    | {"init_lora_weights", "base_correction", "init_r", "vector", "use_dora"}
)
DTYPES = st.sampled_from(
    ["F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", "f32"]
)
LENGTHS = st.sampled_from([0, 7, 1 << 22, (1 << 22) + 1, 1 << 40, (1 << 64) - 1])
SIZES = st.lists(st.integers(-1, 25) | NUMBERS, max_size=4)
VALUES = st.sampled_from(
    [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-39, 6e-8, 65504.0, 1e20, 3.4e38, -1.0]
)
TORCH_DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8]
)
KINDS = st.sampled_from(
    [
        "lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "lora_B.bias", "base_layer", "bias",
        "vera_lambda_b", "miss_block", "bone_block", "svf_vector", "svd_probe", "hada_t1",
        "lora_latent_mapping", "basis_probe", "lokr_w1", "lokr_w2_a", "tinylora_P", "lora_diag",
    ]
)  # fmt: skip


@st.composite
def changed_configs(draw: Any, config: Config) -> Config:
    config = dict(config)
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            name = draw(st.sampled_from(SCALING) | st.sampled_from(sorted(DECIDING)))
            config[name] = draw(DECIDING[name])
            continue
        name = draw(st.sampled_from(sorted(config)) if config else WORDS)
        how = draw(st.integers(0, 3))
        if how == 0:
            config.pop(name, None)
        elif how == 1 and type(config.get(name)) in (int, float):
            config[name] = config[name] * draw(st.sampled_from([2, 0.5, -1])) + draw(st.booleans())
        elif how == 2 and isinstance(config.get(name), dict) and config[name]:
            inner = draw(st.sampled_from(sorted(config[name])))
            config[name] = config[name] | {inner: draw(JSON)}
        else:
            config[name] = draw(JSON)
    return config


@st.composite
def changed_tensors(draw: Any, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        how = draw(st.integers(0, 9))
        name = draw(st.sampled_from(sorted(tensors))) if tensors else "x"
        tensor = tensors.get(name, torch.zeros(1))
        if how == 0:
            tensors.pop(name, None)
        elif how == 1:
            tensors[draw(renamed(name))] = tensor
        elif how == 2 and tensor.numel():
            tensors[name] = tensor.clone()
            place = draw(st.integers(0, tensor.numel() - 1))
            with contextlib.suppress(RuntimeError):  # no NaN in integers
                tensors[name].view(-1)[place] = draw(VALUES)
        elif how == 3:
            with contextlib.suppress(RuntimeError):
                tensors[name] = torch.full_like(tensor, draw(VALUES))
        elif how == 4:
            tensors[name] = tensor.to(draw(TORCH_DTYPES))
        elif how == 5:
            dtype = draw(TORCH_DTYPES)
            floating = {n: t for n, t in tensors.items() if t.is_floating_point()}
            tensors |= {n: t.to(dtype) for n, t in floating.items()}
        elif how == 6:
            tensors[name] = reshaped(tensor, draw(st.integers(0, 4)))
        elif how == 7:
            config, tensors = of_rank(draw, config, tensors)
        elif how == 8:
            tensors[name] = tensor * draw(st.sampled_from([-1, 2**20, 2**-20, 2**60, 2**-120]))
        else:
            # One module less, whole.
            path = name.rpartition(".")[0]
            tensors = {n: t for n, t in tensors.items() if not n.startswith(path)} or tensors
    return config, tensors


@st.composite
def renamed(draw: Any, name: str) -> str:
    stem, _, kind = name.removesuffix(".weight").rpartition(".")
    others = [
        f"{stem}.{kind}.weight", f"{stem}.{kind}", name.replace("base_model.", "", 1),
        name.replace("layers.0", "layers.7"), name.replace("layers.0", "layers.00"),
        name.replace("layers.0", "layers.1"), name.replace("self_attn", "mlp"),
        name.replace("q_proj", "k_proj"), name.replace("q_proj", "o_proj"), name + "\ud800",
        "", "x", "base_model.model.lm_head.weight", "base_model.vera_A",
        *(f"base_model.tinylora_v.{n}" for n in (0, 1, 10**7)),
    ]  # fmt: skip
    kinds = KINDS.map(lambda other: f"{stem}.{other}")
    return str(draw(st.sampled_from(others) | kinds | st.text(max_size=8)))


def reshaped(tensor: Tensor, how: int) -> Tensor:
    if how == 0:
        return tensor[None]
    if how == 1:
        return tensor.reshape(-1)
    if how == 2:
        return tensor.T.contiguous() if tensor.ndim == 2 else tensor[:0]
    if how == 3:
        return tensor[: max(1, len(tensor) // 2)] if tensor.ndim else tensor
    return torch.zeros((0, *tensor.shape[1:]), dtype=tensor.dtype)


def of_rank(draw: Any, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The same adapter cut to a smaller rank, on all modules or some, as its config then says."""
    rank = draw(st.integers(0, 4))
    module = draw(st.sampled_from(["", "q_proj", "v_proj", "up_proj"]))
    cut = dict(tensors)
    for name, tensor in tensors.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if module not in name or tensor.ndim != 2:
            continue
        if "latent" in kind:
            cut[name] = tensor[:rank, :rank]
        elif kind in ("lora_A", "lora_E", "miss_block", "hada_w1_b", "hada_w2_b", "lokr_w2_b"):
            cut[name] = tensor[:rank]
        elif kind in ("lora_B", "hada_w1_a", "hada_w2_a", "lokr_w2_a"):
            cut[name] = tensor[:, :rank]
    if not module:
        return config | {"r": rank}, cut
    pattern = config.get("rank_pattern")
    known = pattern if isinstance(pattern, dict) else {}
    return config | {"rank_pattern": known | {module: rank}}, cut


def serialised(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; of any dtype and name."""
    names = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
        torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
    }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


@st.composite
def changed_headers(draw: Any, header: dict[str, Any]) -> dict[str, Any]:
    header = dict(header)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        how = draw(st.integers(0, 5))
        if how == 0 or not isinstance(entry, dict) or "shape" not in entry:
            header[name] = draw(JSON)
        elif how == 1:
            header[name] = entry | {"dtype": draw(DTYPES)}
        elif how == 2:
            header[name] = entry | {"shape": draw(SIZES)}
        elif how == 3:
            header[name] = entry | {"data_offsets": draw(SIZES)}
        elif how == 4:
            other = header[draw(st.sampled_from(sorted(header)))]
            if isinstance(other, dict):
                header[name] = entry | {"data_offsets": other.get("data_offsets")}
        else:
            header[draw(renamed(name))] = entry
    return header


BEFORE = st.sampled_from([b"\xff" * 8, bytes(8), b"\xef\xbb\xbf", b"[" * 10_000, b'{"a":' * 999])


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """The bytes of a file, some cut off, added or changed: mostly where its sense is."""
    how = draw(st.integers(0, 5))
    end = max(len(data) - 1, 0)
    place = draw(st.integers(0, min(end, 400)) | st.integers(0, end))
    if how == 0:
        return data[:place]
    if how == 1:
        return data + draw(st.binary(max_size=9))
    if how == 2:
        return data[:place] + draw(st.binary(max_size=3)) + data[place:]
    if how == 3:
        return bytes(draw(BEFORE)) + data
    return data[:place] + draw(st.binary(min_size=1, max_size=2)) + data[place + 1 :]


@dataclass
class Example:
    """Two files, where they came from, and how much is kept of other uploads."""

    case: str
    config: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    max_bases: int = 4


def packed(config: Config, tensors: Tensors) -> tuple[bytes, bytes]:
    """Both files of an adapter that is not damaged."""
    header, data = serialised(tensors)
    text = json.dumps(header).encode()
    return json.dumps(config).encode(), len(text).to_bytes(8, "little") + text + data


@st.composite
def examples(draw: Any, known: list[Case]) -> Example:
    case = draw(st.sampled_from(known))
    config, tensors = draw(changed_tensors(case.config, case.tensors))
    config = draw(changed_configs(config))
    header, data = serialised(tensors)
    if draw(RARELY):
        header = draw(changed_headers(header))
    text = json.dumps(config).encode()
    packed = json.dumps(header).encode()
    if draw(RARELY):  # a key given twice
        packed = b'{"__metadata__": {},' + packed[1:]
    length = draw(LENGTHS) if draw(RARELY) else len(packed)
    weights = length.to_bytes(8, "little") + packed + data
    if draw(RARELY):
        weights = draw(damaged(weights))
    if draw(RARELY):
        text = draw(damaged(text))
    return Example(case.name, text, weights, draw(st.sampled_from([4, 4, 0, 1])))


# ------------------------------------------------------------------------------------- checking


class Finding(Exception):
    """Something that must not be."""


class Fuzzer:
    """Takes examples through all that an upload goes through."""

    def __init__(self, folder: Path) -> None:
        self.base = Base(folder)
        self.folder = folder
        self.cases = cases(self.base)
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self._number = itertools.count()

    def one(self, example: Example) -> None:
        """Check one example; raises Finding, or whatever should not have been raised."""
        directory = self.folder / "example"
        directory.mkdir(exist_ok=True)
        (directory / CONFIG).write_bytes(example.config)
        (directory / WEIGHTS).write_bytes(example.weights)
        kept = self.folder / f"bases-{next(self._number)}"
        self.counts["examples"] += 1
        try:
            with bounded_memory(), limited_time():
                self._read(directory, BasisStore(kept), example.max_bases)
        finally:
            shutil.rmtree(kept)

    def _read(self, directory: Path, bases: BasisStore, max_bases: int) -> None:
        try:
            weights = self.base.read(directory, bases, max_bases)
        except (AdapterRejected, AdapterTooLarge) as error:
            str(error).encode()  # can be sent
            if bases.all():
                raise Finding("a refusal left a basis behind") from error
            self.refused[words_of(str(error))] += 1
            self._refused_too(directory)
            return
        self.counts["accepted"] += 1
        self.counts[f"as {weights.format}"] += 1
        record = to_record(weights)
        again = from_record(record, self.base.shape)
        if to_record(again) != record:
            raise Finding("the record of what is read back differs")
        self._pack(again, record_digest(record))
        self._check(directory, record, max_bases)
        self._compare(directory, again, bases)

    def _pack(self, weights: AdapterWeights, digest: str) -> None:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            try:
                spec = make_spec(weights, self.base.shape, digest)
                packed = pack_adapter(weights, self.base.shape, digest, dtype)
            except AdapterRejected:
                self.counts["not packed"] += 1
                continue
            if packed.spec != spec or len(packed.data) != spec.packed_elements:
                raise Finding("packed otherwise than announced")
            if not bool(packed.data.isfinite().all()):
                raise Finding("packed values that are not finite")

    def _refused_too(self, directory: Path) -> None:
        with contextlib.suppress(AdapterRejected, AdapterTooLarge):
            self.base.library.check(adapter_files(directory))
            raise Finding("checked, but not read")

    def _check(self, directory: Path, record: bytes, max_bases: int) -> None:
        try:
            weights = self.base.library.check(adapter_files(directory))
        except (AdapterRejected, AdapterTooLarge):
            self.counts["read, but too large to serve"] += 1
            return
        finally:
            if list((self.folder / "known").iterdir()):
                raise Finding("a check left a basis behind")
        if max_bases == 4 and to_record(weights) != record:
            raise Finding("checked as something else than read")

    def _compare(self, directory: Path, weights: AdapterWeights, bases: BasisStore) -> None:
        config = json.loads((directory / CONFIG).read_bytes())
        more = oracle.must_be_refused(config)
        if more:
            raise Finding(f"{more} is {config[more]!r} and was ignored")
        expected = oracle.changes(config, load_file(directory / WEIGHTS), self.base.world)
        if set(expected) != set(weights.tensors):
            raise Finding(f"changes {sorted(weights.tensors)}, the file {sorted(expected)}")

        def basis_of(basis_id: str) -> Basis:
            known = bases.get(basis_id)
            return self.base.canonical if known is None else known

        parts = BaseParts(
            self.base.shape, self.base.weights.__getitem__, basis_of, self.base.spectral.factors
        )
        for target, change in changes(weights, parts).items():
            w = self.base.world.weights[target]
            got, want = change(w), expected[target].delta
            if not bool(got.isfinite().all()):
                raise Finding(f"{target}: what it changes is not finite")
            allowed = self._allowed(weights, target, float(w.norm()), expected[target].size)
            error = float((got - want).norm())
            if not error <= allowed:
                raise Finding(
                    f"{target}: changes W by {float(got.norm()):g}, should by "
                    f"{float(want.norm()):g}; {error:g} off, {allowed:g} allowed"
                )
        self.counts["compared"] += 1

    def _allowed(self, weights: AdapterWeights, target: Target, norm: float, size: float) -> float:
        """Rounding to float32 of what was multiplied; LoRA-XS's A may be off by 5e-4."""
        of_base = weights.family in ("core", "spectral") or weights.correction or weights.row_scales
        based = norm if of_base or weights.format in ("lora", "dora") else 0.0
        # Below 1e-38 float32 rounds by a fixed amount, and the scale comes behind it.
        tiny = 1e-35 * max(1.0, abs(weights.scales[target]))
        return (1e-3 if weights.family == "core" else 4e-6) * (size + based) + tiny


def words_of(message: str) -> str:
    """A refusal without its names and numbers."""
    rule = message.split(": ", 1)[-1]
    return " ".join(word for word in rule.split() if word.isalpha())[:60]


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Finding(f"took longer than {SECONDS_MAX} s")

    handler = signal.signal(signal.SIGALRM, late)
    others = signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX)  # a test runner's own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """The highest resident size of the example, as Linux counts it, less that before."""
    before = status("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield
    taken = status("VmHWM") - before
    if taken > MEMORY_MAX:
        raise Finding(f"took {taken >> 20} MiB")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


# -------------------------------------------------------------------------------------- running


def run_batch(fuzzer: Fuzzer, number: int, size: int, keep: Path) -> bool:
    """Some examples; True when nothing was found."""

    @seed(number)
    @settings(
        max_examples=size,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(examples(fuzzer.cases))
    def batch(example: Example) -> None:
        fuzzer.one(example)

    try:
        batch()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = keep / f"seed-{number}"
        shutil.copytree(fuzzer.folder / "example", where, dirs_exist_ok=True)
        traceback.print_exc()
        print(f"FOUND by seed {number}, files in {where}", flush=True)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 when nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=200, help="of one seed")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "shoal-fuzz")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What would take all memory raises instead, and is found.
    limit = status("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    clean = True
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder))
        begin = told = time.monotonic()
        for number in itertools.count(args.seed):
            clean &= run_batch(fuzzer, number, args.examples, args.keep)
            now = time.monotonic()
            if now - told > 60 or now - begin > args.seconds:
                told = now
                report(fuzzer, now - begin, number)
            if now - begin > args.seconds:
                break
        print(*(f"{n:8} {words}" for words, n in fuzzer.refused.most_common()), sep="\n")
        fuzzer.base.library.close()
    return 0 if clean else 1


def report(fuzzer: Fuzzer, seconds: float, number: int) -> None:
    shown = ", ".join(f"{name} {count}" for name, count in sorted(fuzzer.counts.items()))
    print(f"{seconds:.0f} s, seed {number}: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
