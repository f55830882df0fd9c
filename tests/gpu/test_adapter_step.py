"""A mixed step on CUDA, through the kernels and in plain torch, against the same step on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora, scale
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import (
    GROUPS,
    UNIT_ELEMENTS,
    AdapterSpec,
    BaseShape,
    Dims,
    Group,
    RowAdapter,
    Section,
    Slot,
)
from shoal.adapters.tables import ActiveFamilies, StepTables

SMOLLM2 = {
    "q_proj": Dims(576, 576),
    "k_proj": Dims(192, 576),
    "v_proj": Dims(192, 576),
    "o_proj": Dims(576, 576),
    "gate_proj": Dims(1536, 576),
    "up_proj": Dims(1536, 576),
    "down_proj": Dims(576, 1536),
}
ODD = {
    "q_proj": Dims(90, 77),
    "k_proj": Dims(33, 77),
    "v_proj": Dims(33, 77),
    "o_proj": Dims(77, 90),
    "gate_proj": Dims(131, 77),
    "up_proj": Dims(131, 77),
    "down_proj": Dims(77, 131),
}
KINDS = [("core", r) for r in (1, 4, 8, 16, 24)]
KINDS += [("fold", r) for r in (1, 4, 7, 16)] + [("lora", r) for r in (1, 3, 8, 16)]
KINDS += [(kind, r) for kind in ("lora corrected", "lora scaled") for r in (3, 16)]
TOLERANCES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
Rows = list[tuple[RowAdapter | None, int]]


def make_banks(
    shape: BaseShape, dtype: torch.dtype
) -> tuple[AdapterBank, AdapterBank, list[RowAdapter]]:
    """The same adapters, rounded to ``dtype``, in a float32 bank on the CPU and one on CUDA.

    The one on CUDA has no joint basis, so that every family goes through the tables' kernels.
    """
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for target in shape.targets():
        dims = shape.dims[target.module]
        random = torch.randn(dims.d_out, min(24, *dims), generator=generator)
        factors[target] = torch.linalg.qr(random)[0].to(dtype).float()
    basis = Basis(id="basis", rank=24, factors=factors, kind="canonical")
    cpu = AdapterBank(
        shape, capacity_bytes=64 << 20, device=torch.device("cpu"), dtype=torch.float32
    )
    gpu = AdapterBank(
        shape, capacity_bytes=64 << 20, device=torch.device("cuda"), dtype=dtype, joint=False
    )
    gpu.arena.fill_(float("nan"))
    torch.cuda.synchronize()
    adapters, unit = [], 1
    for i, (kind, rank) in enumerate(KINDS * 2):
        layout = {"core": core, "fold": fold}.get(kind, lora)
        family = kind.partition(" ")[0]
        basis_id = "basis" if family == "core" else None
        extra: tuple[Section, ...] = ()
        start = 0  # of the family's own section
        if kind == "lora corrected":
            extra = (Section("core", 16, 0, "basis"),)
            start = -(-core.packed_elements(shape, 16) // UNIT_ELEMENTS)
        elif kind == "lora scaled":
            extra = (Section("scale", 0),)
            start = -(-scale.packed_elements(shape) // UNIT_ELEMENTS)
        elements = start * UNIT_ELEMENTS + layout.packed_elements(shape, rank)
        spec = AdapterSpec(f"{i}", family, rank, basis_id, elements, extra, start)  # type: ignore[arg-type]
        adapter = RowAdapter(spec, Slot(unit, -(-elements // UNIT_ELEMENTS)))
        unit += adapter.slot.num_units + 1
        data = (torch.randn(elements, generator=generator) * 0.3).to(dtype)
        cpu.load(adapter, PackedAdapter(spec, data.float()))
        gpu.load(adapter, PackedAdapter(spec, data.pin_memory()))
        adapters.append(adapter)
    for bank in (cpu, gpu):
        bank.add_basis(basis)
    return cpu, gpu, adapters


def draw_rows(adapters: list[RowAdapter], seed: int, prompts: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    choices: list[RowAdapter | None] = [*adapters, None, None]
    drawn = torch.randint(len(choices), (60 + prompts,), generator=generator).tolist()
    return [(choices[c], 1 if i < 60 else 1 + 9 * (i - 60)) for i, c in enumerate(drawn)]


def check(
    shape: BaseShape,
    cpu: AdapterBank,
    rows: Rows,
    tokens: int,
    dtype: torch.dtype,
    tolerance: float,
    apply: Callable[[Group, Tensor, Tensor], Tensor],
) -> None:
    """``apply``: what ``y0`` on the device becomes in layer 1."""
    used = sum(n for _, n in rows)
    owned = [adapter is not None for adapter, n in rows for _ in range(n)]
    is_base = ~torch.tensor(owned + [False] * (tokens - used))
    expect = cpu.step(rows)
    assert expect is not None
    generator = torch.Generator().manual_seed(1)
    for group in GROUPS:
        d_out, d_in = shape.group_dims(group)
        x = torch.randn(tokens, d_in, generator=generator).to(dtype)
        y0 = torch.randn(tokens, d_out, generator=generator).to(dtype)
        wanted = y0.to(torch.float32, copy=True)  # in float32 `float` alone is y0 itself
        expect.apply(1, group, x[:used].float(), wanted[:used])
        y = apply(group, x.cuda(), y0.cuda()).cpu()
        error = (y.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.max() < tolerance, group
        assert torch.equal(y[is_base], y0[is_base])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("dims", [SMOLLM2, ODD], ids=["smollm2", "odd"])
def test_a_step_in_torch_equals_the_cpu(
    dims: dict[str, Dims],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = BaseShape("base", "0" * 64, 2, dims)
    cpu, gpu, adapters = make_banks(shape, dtype)
    rows = draw_rows(adapters, 1, 10)

    def apply(group: Group, x: Tensor, y: Tensor) -> Tensor:
        step = gpu.step(rows)
        assert step is not None
        step.apply(1, group, x, y)
        return y

    check(shape, cpu, rows, sum(n for _, n in rows), dtype, tolerance, apply)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("dims", [SMOLLM2, ODD], ids=["smollm2", "odd"])
def test_replays_of_one_captured_step_equal_the_cpu(
    dims: dict[str, Dims],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = BaseShape("base", "0" * 64, 2, dims)
    cpu, gpu, adapters = make_banks(shape, dtype)
    tables = StepTables(gpu, 1024)
    graphs: dict[tuple[ActiveFamilies, Group], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
    for seed, prompts in ((1, 10), (2, 7), (3, 9)):
        rows = draw_rows(adapters, seed, prompts)
        # Whatever was drawn, the largest of every family is there: one key.
        rows += [(adapter, 1) for adapter in adapters]
        active = tables.fill(rows, 576)

        def apply(group: Group, x: Tensor, y: Tensor, active: ActiveFamilies = active) -> Tensor:
            if (active, group) not in graphs:
                parts = tables.parts(active, 576)
                assert parts.core is None
                static_x, static_y = torch.zeros_like(x), torch.zeros_like(y)
                parts.apply(
                    1, group, parts.before(1, group, static_x), static_y, early=False
                )  # compiles
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    parts.apply(1, group, parts.before(1, group, static_x), static_y, early=False)
                graphs[active, group] = graph, static_x, static_y
            graph, static_x, static_y = graphs[active, group]
            static_x.copy_(x)
            static_y.copy_(y)
            graph.replay()
            return static_y

        check(shape, cpu, rows, 576, dtype, tolerance, apply)
    assert len(graphs) == len(GROUPS)


def test_loads_are_ordered_before_the_fill_that_needs_them() -> None:
    """Although the host waits for nothing, and the source is dropped at once."""
    shape = BaseShape("base", "0" * 64, 2, SMOLLM2)
    _, gpu, adapters = make_banks(shape, torch.float32)
    adapter = next(a for a in adapters if a.spec.family == "lora" and a.spec.rank == 16)
    tables = StepTables(gpu, 64)
    parts = tables.parts(tables.fill([(adapter, 1)], 1), 1)
    x = torch.ones(1, 576, device="cuda")
    for value in (1.0, 2.0, 3.0):
        data = torch.full((adapter.spec.packed_elements,), value).pin_memory()
        with torch.cuda.stream(gpu._load_stream):
            torch.cuda._sleep(20_000_000)
        gpu.load(adapter, PackedAdapter(adapter.spec, data))
        del data
        tables.fill([(adapter, 1)], 1)
        y = torch.zeros(1, 576, device="cuda")
        parts.apply(1, "o", parts.before(1, "o", x), y, early=False)
        assert torch.allclose(y, torch.full_like(y, 16 * 576 * value * value))
        torch.cuda.synchronize()
