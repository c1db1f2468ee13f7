"""Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds over four counter words and two key words; each an int64 tensor in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which is all that the two halves need.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox_words(
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    purpose: int,
    ids: Tensor | int,
    parent: Tensor | None = None,
) -> Tensor:
    """The random word of each id: word `id mod 4` of the call at index `id div 4`.

    Args:
        seed: `[R]` int64. position, base: `[R]` int32, the absolute position and the round base.
        purpose: a `Purpose`, plus 256 times the attempt.
        ids: `[n]` or `[R, n]` integers, or a number n for the ids 0..n-1.
        parent: `[R]` int32 tree node whose children are drawn; adds `parent * 2^26` to the index.

    Returns:
        `[R, n]` int64, each in `[0, 2^32)`.
    """
    rows = seed.shape[0]
    if isinstance(ids, int):
        ids = torch.arange(ids, device=seed.device)
    ids = ids.to(torch.int64).expand(rows, ids.shape[-1])
    index = ids // 4
    if parent is not None:
        index = index + parent.to(torch.int64)[:, None] * (1 << 26)

    def word(x: Tensor) -> Tensor:
        return (x.to(torch.int64)[:, None] & _MASK).expand_as(ids)

    counter = (index & _MASK, word(position), word(base), torch.full_like(ids, purpose))
    words = torch.stack(philox4x32(counter, (word(seed), word(seed >> 32))))
    return words.gather(0, (ids % 4)[None])[0]


def accept_uniform(words: Tensor) -> Tensor:
    """24 bits in [0, 1), float64."""
    return (words >> 8).to(torch.float64) / (1 << 24)


def race_exponential(words: Tensor) -> Tensor:
    """`E = -log1p(-u)`, `u = (x + 0.5) / 2^32` rounded to float32 and clamped to `1 - 2^-24`.

    All 32 bits count: a 24-bit grid loses mass in the tail of a wide vocabulary.
    """
    u = ((words.to(torch.float64) + 0.5) / 2.0**32).to(torch.float32)
    u = u.clamp(max=1.0 - 2.0**-24)
    return -torch.log1p(-u.to(torch.float64))
