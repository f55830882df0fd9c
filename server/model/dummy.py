"""A decoder of random weights: exact shapes, seconds to make, nothing to download.

What a step costs does not depend on the weights' values, so benchmarks need no others.
"""

import torch

from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder


def random_decoder(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    spare_rows: int = 0,
) -> Decoder:
    """Weights at the scale of an untrained model: activations stay finite at any depth.

    They are drawn on the device, one after the other; the same device, dtype and seed give the
    same weights.

    Args:
        spare_rows: see ``Decoder``.
    """
    decoder = Decoder(config, device=device, dtype=dtype, spare_rows=spare_rows)
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in decoder.weight_shapes().items():
        if name.endswith("norm.weight"):
            weight = torch.full(shape, 0.0 if config.norm_plus_one else 1.0, device=device)
        else:
            weight = torch.empty(shape, device=device, dtype=dtype)
            weight.normal_(0.0, 0.02, generator=generator)
        decoder.load_weight(name, weight)
    return decoder
