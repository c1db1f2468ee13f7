"""Tables of rotary embeddings by absolute position, one for all modes of decoding."""

import math

import torch
from torch import Tensor

from eesd.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int) -> Tensor:
    """`[D/2]` float32 inverse frequencies with the config's scaling."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    inverse = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        mixed = (1 - blend) * inverse / rope.factor + blend * inverse
        inverse = torch.where(
            wavelength > low, inverse / rope.factor, torch.where(wavelength < high, inverse, mixed)
        )
    return inverse


def rope_table(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, `[max_position, D/2]`: float32, or float64 for float64 models."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    inverse = inverse_frequencies(config.rope, config.head_size)
    position = torch.arange(config.max_position, dtype=torch.float32)
    angle = torch.outer(position, inverse).to(wide)
    return angle.cos().to(device), angle.sin().to(device)
