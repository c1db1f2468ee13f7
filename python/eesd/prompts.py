"""From `input_ids` and `attention_mask` to unpadded prompts and a seed each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eesd.config import ModelConfig

_U64 = (1 << 64) - 1


def check_prompts(
    config: ModelConfig, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> list[Tensor]:
    """The prompts without their padding, each `[P_b]`; errors name what is wrong with them."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a tensor [B, P], got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: expected int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise ValueError(f"input_ids: expected shape [B, P], got {list(input_ids.shape)}")
    batch, width = input_ids.shape
    lengths = [width] * batch
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else "no tensor"
            raise ValueError(f"attention_mask: expected shape {[batch, width]}, got {got}")
        mask = attention_mask.to(input_ids.device)
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"attention_mask: expected zeros and ones, got {wrong[0].item()}")
        mask = mask != 0
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError(
                "attention_mask: expected left padding (zeros, then ones) in each row; "
                "a zero follows a one"
            )
        lengths = mask.sum(1).tolist()
    for b, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"input_ids: prompt {b} is empty; give it at least one token")
        if length + max_new_tokens > config.max_position:
            raise ValueError(
                f"input_ids: prompt {b} has {length} tokens, which with max_new_tokens = "
                f"{max_new_tokens} is more than the model's {config.max_position} positions"
            )
    prompts = [row[width - length :] for row, length in zip(input_ids, lengths, strict=True)]
    for b, prompt in enumerate(prompts):
        wrong = prompt[(prompt < 0) | (prompt >= config.vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"input_ids: prompt {b} has id {int(wrong[0])}, outside the vocabulary of "
                f"{config.vocab_size}"
            )
    return prompts


def sequence_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One int64 seed a sequence; sequence 0 of an integer seed takes it as it is."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, (bool, str)) or not isinstance(seed, (int, Sequence)):
        raise TypeError(f"seed: expected an integer or one a sequence, got {seed!r}")
    if isinstance(seed, int):
        seeds = [seed] + [_mix(seed, b) for b in range(1, batch)]
    else:
        seeds = list(seed)
        if len(seeds) != batch:
            raise ValueError(f"seed: expected {batch} seeds, one a sequence, got {len(seeds)}")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seed: expected integers, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {value}")
    return seeds


def _mix(seed: int, index: int) -> int:
    """SplitMix64 (Steele et al. 2014) of the seed and the sequence's index, as int64."""
    z = (seed + index * 0x9E3779B97F4A7C15) & _U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
    z ^= z >> 31
    return z - (1 << 64) if z >= 1 << 63 else z
