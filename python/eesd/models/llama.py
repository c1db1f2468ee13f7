"""Llama-shaped backbones with the split that early exit needs: embed, layers a to b, norm, head.

Llama, Mistral, Qwen2 and Qwen3: the parts in which they differ are the layers' own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from eesd.cache import Block, KVCache
from eesd.config import ModelConfig
from eesd.layer import INFERENCE, LayerOps, LayerWeights, decoder_layer
from eesd.rope import rope_table
from eesd.weights import WeightFolder
from eesd_kernels.linear import linear_op


class Llama:
    """A frozen decoder. `dtype` is that of activations and cache; weights may be narrower."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        lm_head: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.norm = norm
        self.lm_head = lm_head
        self.dtype = dtype
        self.device = embedding.device
        self.rope = rope_table(config, self.device, dtype)

    @classmethod
    def load(
        cls, config: ModelConfig, folder: WeightFolder, device: torch.device, dtype: torch.dtype
    ) -> "Llama":
        """Read a folder's weights, in any number of shards, tied or untied."""
        # bfloat16 weights under float32 activations give the float32 result at half the bytes.
        stored = None if dtype is torch.float32 else dtype
        table = (config.vocab_size, config.hidden_size)

        def get(name: str, *shape: int) -> Tensor:
            value = folder.tensor(name, shape, device, stored)
            narrow = value.dtype is torch.bfloat16 and device.type == "cpu"
            return value if stored is not None or narrow else value.to(dtype)

        embedding = get("model.embed_tokens.weight", *table)
        return cls(
            config,
            embedding,
            [
                LayerWeights.load(
                    folder, f"model.layers.{i}.", config, window, device, embedding.dtype
                )
                for i, window in enumerate(config.windows)
            ],
            get("model.norm.weight", config.hidden_size),
            embedding if config.tied_head else get("lm_head.weight", *table),
            dtype,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """ids `[B, T]` to hidden states `[B, T, H]`."""
        return torch.nn.functional.embedding(ids, self.embedding).to(self.dtype)

    def run_layers(
        self, hidden: Tensor, first: int, last: int, cache: KVCache, block: Block
    ) -> Tensor:
        """Layers `first .. last-1` over a block of rows, writing their K and V."""
        for i in range(first, last):
            layer = self.layers[i]
            attend = partial(cache.attend, i, block=block, window=layer.window)
            hidden = decoder_layer(layer, hidden, attend, self.config.rms_eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: `[B, T, H]` to `[B, T, V]`."""
        return linear_op(hidden, self.lm_head, None, self.norm, self.config.rms_eps)

    def new_cache(self, batch: int, capacity: int, *, exit_layers: int) -> KVCache:
        """An empty cache for this backbone."""
        return KVCache(self.config, batch, capacity, self.rope, self.dtype, exit_layers=exit_layers)

    def causal_layer(
        self, weights: LayerWeights, hidden: Tensor, ops: LayerOps = INFERENCE
    ) -> Tensor:
        """One layer over whole sequences `[B, T, H]`, no cache; `TRAINING` differentiates."""
        attend = self._causal(hidden.shape[1], weights.window)
        return decoder_layer(weights, hidden, attend, self.config.rms_eps, ops)

    def _causal(self, length: int, window: int | None) -> Callable[[Tensor], Tensor]:
        config = self.config
        cos, sin = (t[:length, None].to(self.dtype) for t in self.rope)
        mask = None
        if window is not None and window < length:
            place = torch.arange(length, device=self.device)
            back = place[:, None] - place
            mask = (back >= 0) & (back < window)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).transpose(1, 2)

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.unflatten(-1, (-1, config.head_size))
            q, k, v = heads.split(
                [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2
            )
            out = torch.nn.functional.scaled_dot_product_attention(
                rotate(q),
                rotate(k),
                v.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=config.num_heads != config.num_kv_heads,
            )
            return out.transpose(1, 2).flatten(2)

        return attend
