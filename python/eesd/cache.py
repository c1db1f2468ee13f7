"""The KV cache: one tensor for all layers of the backbone and the exit layer's own."""

from typing import NamedTuple

import torch
from torch import Tensor

from eesd.config import ModelConfig
from eesd_kernels.rope_cache_write import rope_cache_write_op
from eesd_kernels.tree_attention import tree_attention_op


class Block(NamedTuple):
    """Where a block of new rows stands in its sequences.

    lengths `[B]` int32: cached tokens before the block. num_rows `[B]` int32: live rows of it; the
    others store nothing. sequence: the one row of the cache that is meant (prefill), or None for
    all of them.
    """

    lengths: Tensor
    num_rows: Tensor
    sequence: int | None = None


class CacheTooLarge(RuntimeError):
    """There is no memory for a cache; the message names its size."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class KVCache:
    """`[layers, 2, B, S, Hkv, D]`, layers 0..L-1 of the backbone, then the exit layer's.

    Nothing at or above a sequence's length is read before it is written again, so rolling back a
    linear draft moves no bytes.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        rope: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        *,
        exit_layers: int,
    ) -> None:
        device = rope[0].device
        shape = (config.num_layers + exit_layers, 2, batch, capacity)
        try:
            self.data = torch.zeros(
                *shape, config.num_kv_heads, config.head_size, dtype=dtype, device=device
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            element = torch.empty((), dtype=dtype).element_size()
            size = (
                2 * shape[0] * batch * capacity * config.num_kv_heads * config.head_size * element
            )
            raise CacheTooLarge(
                f"the KV cache of {batch} sequences of {capacity} tokens ({size / 2**30:.1f} GiB) "
                f"does not fit on {device}: lower the batch or max_new_tokens"
            ) from None
        self.capacity = capacity
        self._rope = rope
        self._scale = config.head_size**-0.5
        self._layers = [(kv[0], kv[1]) for kv in self.data]

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return self.data.numel() * self.data.element_size()

    def attend(self, layer: int, qkv: Tensor, block: Block, window: int | None = None) -> Tensor:
        """Write the block's K and V, and attend from it: `[B, T, .]` to `[B, T, Hq D]`.

        window: positions that a row sees, its own among them; None: all.
        """
        k, v = self._layers[layer]
        if block.sequence is not None:
            k, v = k[block.sequence, None], v[block.sequence, None]
        cos, sin = self._rope
        q = rope_cache_write_op(qkv, cos, sin, k, v, block.lengths, block.num_rows, None)
        out = tree_attention_op(
            q, k, v, block.lengths, block.num_rows, self._scale, None, None, window
        )
        return out.flatten(2)

    def write(self, layer: int, qkv: Tensor, block: Block) -> None:
        """Write the block's K and V only."""
        k, v = self._layers[layer]
        if block.sequence is not None:
            k, v = k[block.sequence, None], v[block.sequence, None]
        cos, sin = self._rope
        rope_cache_write_op(qkv, cos, sin, k, v, block.lengths, block.num_rows, None)
