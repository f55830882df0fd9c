"""A mixed step on CUDA, through the kernels and in plain torch, against the same step on a CPU."""

import pytest
import torch

from shoal.adapters.bank import UNIT_ELEMENTS, AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import GROUPS, AdapterSpec, BaseShape, Dims, RowAdapter, Slot

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


def make_banks(
    shape: BaseShape, dtype: torch.dtype, kernels: bool
) -> tuple[AdapterBank, AdapterBank, list[RowAdapter]]:
    """The same adapters, rounded to ``dtype``, in a float32 bank on the CPU and one on CUDA."""
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
        shape, capacity_bytes=64 << 20, device=torch.device("cuda"), dtype=dtype, kernels=kernels
    )
    gpu._records.arena.fill_(float("nan"))
    adapters, unit = [], 1
    for i, (family, rank) in enumerate(KINDS * 2):
        elements = {"core": core, "fold": fold, "lora": lora}[family].packed_elements(shape, rank)
        basis_id = "basis" if family == "core" else None
        spec = AdapterSpec(f"{i}", family, rank, basis_id, elements)  # type: ignore[arg-type]
        adapter = RowAdapter(spec, Slot(unit, -(-elements // UNIT_ELEMENTS)))
        unit += adapter.slot.num_units + 1
        data = (torch.randn(elements, generator=generator) * 0.3).to(dtype)
        cpu.load(adapter, PackedAdapter(spec, data.float()))
        gpu.load(adapter, PackedAdapter(spec, data.pin_memory()))
        adapters.append(adapter)
    for bank in (cpu, gpu):
        bank.add_basis(basis)
    return cpu, gpu, adapters


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("dims", [SMOLLM2, ODD], ids=["smollm2", "odd"])
def test_a_mixed_step_equals_the_cpu(
    dims: dict[str, Dims],
    dtype: torch.dtype,
    tolerance: float,
    kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    shape = BaseShape("base", "0" * 64, 2, dims)
    cpu, gpu, adapters = make_banks(shape, dtype, kernels)
    generator = torch.Generator().manual_seed(1)
    choices: list[RowAdapter | None] = [*adapters, None, None]
    drawn = torch.randint(len(choices), (70,), generator=generator).tolist()
    rows = [(choices[c], 1) for c in drawn[:60]]
    rows += [(choices[c], 1 + 9 * i) for i, c in enumerate(drawn[60:])]
    total = sum(n for _, n in rows)
    is_base = torch.tensor([adapter is None for adapter, n in rows for _ in range(n)])
    expect, actual = cpu.step(rows), gpu.step(rows)
    assert expect is not None
    assert actual is not None
    for group in GROUPS:
        d_out, d_in = shape.group_dims(group)
        x = torch.randn(total, d_in, generator=generator).to(dtype)
        y0 = torch.randn(total, d_out, generator=generator).to(dtype)
        wanted, y = y0.float(), y0.cuda()
        expect.apply(1, group, x.float(), wanted)
        actual.apply(1, group, x.cuda(), y)
        error = (y.cpu().float() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.max() < tolerance, group
        assert torch.equal(y.cpu()[is_base], y0[is_base])
