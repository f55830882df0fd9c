"""A device runner that launches nothing, to see which kernel variants start-up and steps need.

A script: ``python kernel_variants.py [--others]``. It starts runners the way a CUDA server does,
submits random steps to them, and prints the variants that only those needed; it fails if there are
any. Tensors are on a CPU, the target is an H100, every launch goes as far as Triton's cache of
compiled kernels and no further, and GEMMs multiply nothing: what is computed is arbitrary.
``--others`` also prints what is needed for adapters that nothing is prepared for.
"""

import importlib
import pkgutil
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import shoal.kernels
from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.host_tier import HostTier
from shoal.adapters.spec import GROUPS, AdapterSpec, BaseShape, RowAdapter, Section, Slot
from shoal.adapters.tables import ActiveFamilies
from shoal.kernels import launching
from shoal.kernels.paged_attention import kernel as paged_attention
from shoal.server.assemble import CAPTURED, prepared_families
from shoal.server.engine.plan import Row, StepPlan
from shoal.server.engine.request import SamplingParams
from shoal.server.model import fused, starting
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Linear
from shoal.server.model.device_runner import DeviceRunner, RunnerLimits
from shoal.server.model.dummy import random_decoder
from shoal.server.model.gemms import SPARE_ROWS, Choice, GemmPlan, Shape, candidates
from shoal.server.model.graphs import row_buckets
from shoal.server.model.kv_cache import KVCache

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOCK_TOKENS = 16
STEPS = 40  # of each kind of adapters
# Rows, tokens of a step, positions: as many rows as by default, whose numbers divide well; a prompt
# long beside the rows; few of all, whose numbers divide badly, and no joint basis.
WORLDS = (
    ((256, 2048, 8192), torch.bfloat16),
    ((40, 1500, 2048), torch.bfloat16),
    ((21, 500, 1000), torch.float16),
)
# As `shoal.server.assemble` makes it of the canonical basis.
SCALE = (Section("scale", 0),)
Kinds = dict[str, list[tuple[str, int, str | None, tuple[Section, ...]]]]
# Adapters of a step, by what is prepared for them: family, rank, basis, other sections.
KINDS: Kinds = {
    "base": [],
    "core 16": [("core", rank, "canonical", ()) for rank in (8, 16)],
    "core 4": [("core", rank, "canonical", ()) for rank in (4, 12)],
    "fold": [("fold", rank, None, ()) for rank in (4, 7, 16)],
    "fold 64": [("fold", rank, None, ()) for rank in (40, 64)],
    "lora": [("lora", rank, None, ()) for rank in (3, 8, 16)],
    "dora": [("lora", rank, None, SCALE) for rank in (3, 8, 16)],
    "wide": [("core", rank, "late", ()) for rank in (8, 16)],
}
# The same where there is a joint basis.
JOINT: Kinds = {
    "core 32": [("core", rank, "canonical", ()) for rank in (8, 16, 24, 32)],
    "core 25": [("core", rank, "canonical", ()) for rank in (8, 20, 25)],
}
# What may be compiled when it is first needed: ranks and mixes that nothing is prepared for.
OTHERS: Kinds = {
    "core 64": [("core", 16, "foreign", ())],
    "fold 32": [("fold", 32, None, ())],
    "lora 32": [("lora", 32, None, ())],
    "wide 4": [("core", 4, "late", ())],
    "wide 32": [("core", 32, "late", ())],
    "wide 64": [("core", 48, "canonical", ())],
    "mixed": [*KINDS["core 16"], *KINDS["lora"], *KINDS["fold"]],
}


class Variant(NamedTuple):
    kernel: str
    arguments: tuple[tuple[str, object], ...]  # name, what is compiled for
    options: str


class Driver:
    """An H100 that cannot be launched on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Unlaunched:
    """What stands in the cache in place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        pass

    def run(self, *_: object) -> None:
        pass


class Collecting(triton.AsyncCompileMode):
    def submit(self, key: str, compile_fn: Any, finalize_fn: Any, *_: object) -> Unlaunched:
        finalize_fn(UNLAUNCHED)
        return UNLAUNCHED


UNLAUNCHED = Unlaunched()


def jit_functions() -> Iterator[JITFunction]:
    for module in pkgutil.iter_modules(shoal.kernels.__path__):
        if module.ispkg:
            jit = importlib.import_module(f"shoal.kernels.{module.name}.jit")
            yield from (v for v in vars(jit).values() if isinstance(v, JITFunction))


def met() -> set[Variant]:
    """Every variant that was launched so far."""
    return {
        Variant(
            function.__name__,
            tuple((p.name, spec) for p, spec in zip(function.params, specialised, strict=True)),
            options,
        )
        for function in set(jit_functions())
        if 0 in function.device_caches
        for specialised, options in function.device_caches[0][1]
    }


def launch_everything() -> None:
    """Have the server's modules call ``launch_<op>`` where they call ``op``."""
    for module in pkgutil.iter_modules(shoal.kernels.__path__):
        if not module.ispkg:
            continue
        kernel = importlib.import_module(f"shoal.kernels.{module.name}.kernel")
        for name in [name for name in vars(kernel) if name.startswith("launch_")]:
            op, launch = getattr(kernel, name.removeprefix("launch_")), getattr(kernel, name)
            if name == "launch_sample_tokens":
                launch = zeros_of(launch)  # or nothing would be a token
            for user_name, user in list(sys.modules.items()):
                if user_name.startswith(("shoal.server", "shoal.adapters")):
                    for known in [k for k, v in vars(user).items() if v is op]:
                        setattr(user, known, launch)


def zeros_of(launch: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Tensor:
        return launch(*arguments, **named).zero_()

    return call


def multiply(x: Tensor, linear: Linear, choice: Choice) -> Tensor:
    return x.new_empty(len(x), linear.weight.shape[0] + choice.columns)


def any_plan(limits: RunnerLimits, draw: random.Random) -> GemmPlan:
    """What measuring might have found."""
    rows = row_buckets(limits.max_num_seqs)
    rows += tuple(count for count in starting.PROMPT_ROWS if count > rows[-1])
    choices = {}
    for count in rows:
        for columns in (0, *(active.core_columns for active in CAPTURED)):
            for group in GROUPS:
                widths = candidates(group, columns)
                if columns and group == "gate_up" and count <= starting.BESIDE_ROWS:
                    widths = (0, *widths)
                choices[Shape(group, count, columns)] = Choice(draw.choice(widths))
    return GemmPlan(choices, rows)


def bases(shape: BaseShape) -> Iterator[Basis]:
    for name, rank in (("canonical", 64), ("foreign", 32), ("late", 32)):
        factors = {
            target: torch.zeros(shape.dims[target.module].d_out, rank) for target in shape.targets()
        }
        kind = "canonical" if name == "canonical" else "uploaded"
        yield Basis(id=name, rank=rank, factors=factors, kind=kind)


def make_runner(
    limits: RunnerLimits, dtype: torch.dtype, joint: bool, draw: random.Random
) -> DeviceRunner:
    config = ModelConfig.from_hf(CONFIG)
    shape = config.base_shape("tiny", "0" * 64)
    cpu = torch.device("cpu")
    decoder = random_decoder(config, cpu, dtype, spare_rows=SPARE_ROWS)
    kv = KVCache(config, num_blocks=2, block_tokens=BLOCK_TOKENS, device=cpu, dtype=dtype)
    bank = AdapterBank(shape, capacity_bytes=16 << 20, device=cpu, dtype=dtype, joint=joint)
    for basis in bases(shape):
        bank.add_basis(basis)
    plan = any_plan(limits, draw)
    return starting.make_device_runner(decoder, kv, bank, HostTier(1 << 20), limits, plan)


def adapters(kinds: Sequence[Any]) -> list[RowAdapter]:
    return [
        RowAdapter(AdapterSpec(f"{i:064x}", family, rank, basis, 16, extra), Slot(0, 1))
        for i, (family, rank, basis, extra) in enumerate(kinds)
    ]


def any_step(limits: RunnerLimits, owners: Sequence[RowAdapter], draw: random.Random) -> StepPlan:
    """Some rows, or many; some prompts, short or long; or none."""
    most, room = limits.max_num_seqs, limits.max_num_batched_tokens
    count = draw.choice([0, 1, 2, draw.randint(0, most), draw.randint(0, most), most])
    chunks = draw.choice([0, 1, draw.randint(0, most - count), most - count])
    chunks = max(min(chunks, most - count), 0 if count else 1)
    lengths = [1] * count
    each = draw.choice([2, draw.randint(2, 80), room])
    for left in range(chunks, 0, -1):
        most_now = min(limits.max_model_len, room - sum(lengths) - 2 * (left - 1))
        if most_now >= 2:
            lengths.append(min(most_now, max(2, draw.randint(each // 2, each))))
    longest = draw.choice([64, 300, 600, 1024, 3000, limits.max_model_len])
    greedy = draw.random() < 0.3
    asking = draw.random() < 0.1
    rows = []
    for lane, length in enumerate(lengths):
        start = draw.randint(0, max(0, min(longest, limits.max_model_len) - length))
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0 if greedy else draw.choice([0.0, 1.0]),
            logprobs=1 if asking else None,
        )
        rows.append(
            Row(
                request_id=str(lane),
                token_ids=(0,) * length,
                start=start,
                block_ids=(0,) * -(-(start + length) // BLOCK_TOKENS),
                sample=length == 1 or draw.random() < 0.8,
                sampling=sampling,
                adapter=draw.choice([None, *owners]),
                lane=lane,
            )
        )
    if owners:  # the set is to be the same in every step
        rows[0] = rows[0]._replace(adapter=owners[-1])
    return StepPlan(rows=tuple(rows))


def told(variant: Variant, known: set[Variant]) -> str:
    """What of a new variant is not as in the known one that is most like it."""
    like = [other for other in known if other.kernel == variant.kernel]

    def differs(other: Variant) -> list[str]:
        pairs = zip(other.arguments, variant.arguments, strict=True)
        found = [f"{n}: {was} -> {now}" for (n, was), (_, now) in pairs if was != now]
        if other.options != variant.options:
            found.append(f"options {other.options} -> {variant.options}")
        return found

    best = min(map(differs, like), key=len, default=["never met"])
    return f"{variant.kernel}: " + ", ".join(best)


def needed_late(sizes: tuple[int, int, int], dtype: torch.dtype, *, others: bool) -> int:
    """How many variants a runner of such sizes needs that it has not met at start."""
    limits = RunnerLimits(
        max_num_seqs=sizes[0], max_num_batched_tokens=sizes[1], max_model_len=sizes[2]
    )
    draw = random.Random(limits.max_num_seqs)
    for function in jit_functions():
        function.device_caches.clear()
    joint = fused.defers_norms(ModelConfig.from_hf(CONFIG), dtype)
    families, later, compiled = prepared_families("canonical", joint=joint)
    runner = make_runner(limits, dtype, joint, draw)
    starting.plan_graphs(runner, families, later)
    starting.meet(runner, (ActiveFamilies(), *families), later, compiled, lambda *_: None)
    known = met()
    print(f"{limits}: {len(known)} variants are met at start")
    found = 0
    for name, kinds in (KINDS | (JOINT if joint else {}) | (OTHERS if others else {})).items():
        owners = adapters(kinds)
        for _ in range(STEPS):
            runner.submit(any_step(limits, owners, draw))
        late = met() - known
        for variant in sorted(late, key=str):
            print(f"{name}: {told(variant, known)}")
        found += 0 if name in OTHERS else len(late)
        known |= late
    return found


def main(others: bool) -> int:
    triton.runtime.driver.set_active(Driver())
    launching._overlaps = lambda device: True
    paged_attention.processors = lambda device: 132
    fused.multiply = multiply
    launch_everything()
    with Collecting(None):
        return sum(needed_late(sizes, dtype, others=others) for sizes, dtype in WORLDS)


if __name__ == "__main__":
    sys.exit(main("--others" in sys.argv) > 0)
