"""What is written: served by the engine, and read by PEFT, it is what was trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.adapters import reading_oracle
from tests.adapters.training.method_cases import CASES, Trial, fresh
from tests.e2e.serving_logits import Made, serve, wrong

from shoal.adapters.formats.keys import module_path
from shoal.adapters.spec import Target
from shoal.adapters.training.methods.adalora import AdaloraLinear
from shoal.adapters.training.methods.attaching import find_linears
from shoal.server.config import ServeConfig

# What PEFT reads; MiLoRA only once it is converted.
WITHIN_PEFT = (
    "lora",
    "rslora",
    "lora-plus",
    "dora",
    "pissa",
    "milora",
    "miss",
    "adalora",
    "vera",
)
OF_PEFT = [
    name
    for name, (method, _) in CASES.items()
    if method in WITHIN_PEFT and name not in ("miss by output", "milora")
]
LENGTH = 16
IDS = torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(2))

# What PEFT calls a factor.
PEFTS_NAMES = {
    "A": "lora_A",
    "B": "lora_B",
    "E": "lora_E",
    "m": "lora_magnitude_vector",
    "D": "miss_block",
    "b": "vera_lambda_b",
    "d": "vera_lambda_d",
}

# Reader's name of the format, and the family it is served as.
SERVED: dict[str, tuple[str, str]] = {
    "lora": ("lora", "lora"),
    "rslora": ("lora", "lora"),
    "lora-plus": ("lora", "lora"),
    "dora": ("dora", "lora"),
    "pissa": ("lora", "lora"),
    "milora": ("lora", "lora"),
    "lora-xs": ("lora_xs", "core"),
    "miss": ("miss", "fold"),
    "adalora": ("adalora", "lora"),
    "vera": ("vera", "lora"),
    "svf": ("svf", "spectral"),
    "svft": ("svft", "spectral"),
    # Frozen factors that the base's output does not give, are factors of the adapter's own.
    "lora-xs bottom without sigma": ("lora_xs", "lora"),
    "lora-xs random": ("lora_xs", "lora"),
    "lora-xs svd of random": ("lora_xs", "lora"),
    "lora-xs svd of random without sigma": ("lora_xs", "lora"),
    "miss by output": ("miss", "lora"),
}


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trial, Path]]:
    """Every case after a few steps of its second lane, and where that lane is written."""
    root = tmp_path_factory.mktemp("trained")
    made = {}
    for name in CASES:
        trial = Trial(base, root / "cache", name, (1, 2))
        trial.train(8)
        folder = root / name.replace(" ", "-").replace(",", "")
        trial.method.write(folder, trial.adapted, 1, trial.source)
        made[name] = (trial, folder)
    return made


def of_second_lane(trial: Trial, ids: torch.Tensor) -> torch.Tensor:
    """``(rows, length, vocab)``: every lane gets the rows, the second answers."""
    return trial.logits(ids.repeat(2, 1))[len(ids) :]


def test_the_engine_serves_what_the_trainer_computed(
    trained: dict[str, tuple[Trial, Path]],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = {}
    rng = torch.Generator().manual_seed(1)
    for number, (name, (trial, folder)) in enumerate(trained.items()):
        ids = torch.randint(3, 200, (2, LENGTH), generator=rng)
        logits = of_second_lane(trial, ids).double()
        files = {path.name: path for path in folder.glob("adapter_*")}
        served = SERVED.get(name, SERVED[CASES[name][0]])
        made[f"a{number}"] = Made(served, files, (ids[0], logits[0]), (ids[1], logits[1]))
    config = ServeConfig(
        model=str(base),
        registry=f"sqlite:///{tmp_path / 'registry.db'}",
        device="cpu",
        dtype="float32",
        gpu_memory_utilization=0.2,
        spectral_memory=64 << 20,
        max_model_len=128,
        block_size=4,
        max_num_seqs=len(made),
        max_num_batched_tokens=2 * len(made),
    )
    assert not wrong(serve(config, made, monkeypatch))


@pytest.mark.parametrize("name", CASES)
def test_the_files_mean_what_was_trained(
    name: str, trained: dict[str, tuple[Trial, Path]], base: Path
) -> None:
    trial, folder = trained[name]

    def basis_of(basis_id: str, target: Target) -> torch.Tensor:
        assert basis_id == trial.source.canonical.id
        return trial.source.canonical.factors[target].double()

    def singular(target: Target) -> tuple[torch.Tensor, ...]:
        return tuple(part.double() for part in trial.source.spectral.factors(target))

    weights = {target: weight.double() for target, weight in trial.plain.items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert reading_oracle.must_be_refused(config) is None
    changes = reading_oracle.changes(
        config,
        load_file(folder / "adapter_model.safetensors"),
        reading_oracle.World(weights, basis_of, singular),  # type: ignore[arg-type]
    )
    model = fresh(base).double()
    linears = {target: linear for target, (_, linear) in find_linears(model).items()}
    for target, change in changes.items():
        linears[target].weight.data += change.delta
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    logits = of_second_lane(trial, IDS).double()
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", OF_PEFT)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
# Of the keys of AdaLoRA's own rank_pattern PEFT says that they fit no module, and uses them.
@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")
def test_peft_reads_it_as_it_was_trained(
    name: str, trained: dict[str, tuple[Trial, Path]], base: Path
) -> None:
    trial, folder = trained[name]
    model = PeftModel.from_pretrained(fresh(base), folder)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    expected = of_second_lane(trial, IDS)
    torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "dora", "pissa exact", "miss", "miss mini", "vera", "adalora"]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The following rank_pattern:RuntimeWarning")
def test_its_gradients_are_pefts(
    name: str, trained: dict[str, tuple[Trial, Path]], base: Path
) -> None:
    trial, folder = trained[name]
    trial.optimizer.zero_grad()
    trial.model(input_ids=IDS.repeat(2, 1)).logits[len(IDS) :].logsumexp(-1).sum().backward()
    model = PeftModel.from_pretrained(fresh(base), folder, is_trainable=True)
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    compared = 0
    for target, linear in trial.adapted.items():
        theirs = {
            key.removeprefix(f"base_model.model.{module_path(target)}.").split(".")[0]: p.grad
            for key, p in model.named_parameters()
            if f".{module_path(target)}." in key and p.grad is not None
        }
        for kind, factor in linear.factors().items():
            expected = theirs[PEFTS_NAMES[kind]]
            assert factor.grad is not None
            own = factor.grad[1]
            if isinstance(linear, AdaloraLinear):  # without what is not in the file
                own = own[:, linear.kept[1]] if kind == "B" else own[linear.kept[1]]
            own = own.reshape(expected.shape)
            tolerance = 1e-4 * float(expected.norm())
            torch.testing.assert_close(own, expected, atol=tolerance, rtol=0)
            compared += 1
    assert compared == sum(p.grad is not None for p in model.parameters())


def test_adalora_writes_values_that_are_older_than_the_last_allocation(
    base: Path, tmp_path: Path
) -> None:
    trial = Trial(base, tmp_path / "cache", "adalora early")
    trial.method.write(tmp_path / "fresh", trial.adapted, 0, trial.source)
    trial.train(1)
    early = {target: linear.values(0)["E"] for target, linear in trial.adapted.items()}
    trial.train(7)
    for target, linear in trial.adapted.items():  # as early stopping puts back the best ones
        linear.factors()["E"].data[0] = early[target]
    trial.method.write(tmp_path / "early", trial.adapted, 0, trial.source)
    for folder in ("fresh", "early"):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        values = sum(len(tensor) for key, tensor in tensors.items() if key.endswith("lora_E"))
        whole = folder == "fresh"
        expected = sum(8 if whole else int((e != 0).sum()) for e in early.values())
        assert values == expected > 4 * len(early)


def test_adalora_writes_what_allocation_left(trained: dict[str, tuple[Trial, Path]]) -> None:
    trial, folder = trained["adalora early"]
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = [len(tensor) for key, tensor in tensors.items() if key.endswith("lora_E")]
    assert sum(ranks) == 4 * len(trial.adapted)
    assert max(ranks) > 4 > min(ranks)
