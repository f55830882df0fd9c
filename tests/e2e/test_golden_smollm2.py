"""Every format and family against its origin, on SmolLM2: served logits, alone and in one batch.

As `test_golden_families.py`; adapters are of two layers, because that is what their making costs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.origins import CASES, Base
from tests.e2e.serving_logits import make_all, serve, silent, wrong
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.spectral_basis import SpectralBasis
from shoal.server.config import ServeConfig
from shoal.server.model.gguf import GGUFFile
from shoal.server.model.pull import smollm2_path

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of what it is asked to do here
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def smollm2(path: Path) -> Any:
    """As transformers computes it. (That it reads the file alike is tested with the reader.)"""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        )
    )
    missing, unexpected = model.load_state_dict(dict(GGUFFile(path).tensors()), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads gain little here, and cost much beside other work: most matrices are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread")
def test_float32(
    make_adapter: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = smollm2_path()
    assert path.is_file(), "run `shoal pull smollm2` first"
    base = Base(smollm2(path), path, make_adapter, layers=(1, 29))
    made = make_all(base, CASES, tmp_path / "files", 8)
    assert silent(base, made, 0.02) == {}
    # The canonical basis may come from the user's cache, but nothing is left there.
    monkeypatch.setattr(
        "shoal.server.assemble.SpectralBasis",
        lambda weight_of, shape, _, **more: SpectralBasis(
            weight_of, shape, tmp_path / "svd", **more
        ),
    )
    settings = ServeConfig(
        model=str(path),
        registry=f"sqlite:///{tmp_path / 'registry.db'}",
        device="cpu",
        adapter_memory=1 << 30,
        max_model_len=64,
        max_num_seqs=48,
        max_num_batched_tokens=96,
    )
    assert wrong(serve(settings, made, monkeypatch)) == {}
