"""Rotate queries and keys (half-split RoPE, as Llama) and write K and V into the cache.

Paged: slot s of sequence b is offset `s mod page_size` of page `block_table[b, s div page_size]`.
"""

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[T, heads, D]`; cos, sin `[T, D/2]`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(inner).chunk(2, dim=-1)
    c, s = cos.to(inner)[:, None], sin.to(inner)[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


def rope_cache_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    batch, rows, _ = qkv.shape
    size, kv_heads, head_size = k_cache.shape[1:]
    heads = qkv.shape[-1] // head_size
    q, k, v = qkv.unflatten(-1, (heads, head_size)).split(
        [heads - 2 * kv_heads, kv_heads, kv_heads], dim=2
    )
    step = torch.arange(rows, device=qkv.device)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(batch):
        live = int(num_rows[b])
        slot = lengths[b] + step[:live]
        at = slot if depth is None else lengths[b] + depth[b, :live]
        out[b, :live] = _rotate(q[b, :live], cos[at], sin[at])
        sequence = torch.full_like(slot, b) if block_table is None else block_table[b, slot // size]
        place = sequence.long(), slot if block_table is None else slot % size
        k_cache[place] = _rotate(k[b, :live], cos[at], sin[at]).to(k_cache.dtype)
        v_cache[place] = v[b, :live].to(v_cache.dtype)
    return out
