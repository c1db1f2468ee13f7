"""One pre-norm decoder layer, the building block of backbones and of exit heads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eesd.config import ModelConfig
from eesd.weights import WeightFolder
from eesd_kernels import reference
from eesd_kernels.linear import linear_op
from eesd_kernels.rms_norm import rms_norm_op
from eesd_kernels.swiglu import swiglu_op


class LayerOps(NamedTuple):
    """The three ops of a layer besides attention."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]


INFERENCE = LayerOps(linear_op, rms_norm_op, swiglu_op)
TRAINING = LayerOps(reference.linear, reference.rms_norm, reference.swiglu)
"""Plain PyTorch, which autograd and torch.compile see through."""


class LayerWeights(NamedTuple):
    """Projections that read the same input are fused: q, k, v in one weight, gate and up in one."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    output: Tensor  # [H, Hq D]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [H, I]

    @classmethod
    def load(
        cls,
        folder: WeightFolder,
        prefix: str,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> "LayerWeights":
        """Read a layer under its Hugging Face names: `<prefix>self_attn.q_proj.weight`, ..."""
        hidden, inter, head = config.hidden_size, config.intermediate_size, config.head_size
        heads, kv_heads = config.num_heads * head, config.num_kv_heads * head

        def get(name: str, *shape: int) -> Tensor:
            return folder.tensor(f"{prefix}{name}.weight", shape, device, dtype)

        return cls(
            input_norm=get("input_layernorm", hidden),
            qkv=torch.cat(
                (
                    get("self_attn.q_proj", heads, hidden),
                    get("self_attn.k_proj", kv_heads, hidden),
                    get("self_attn.v_proj", kv_heads, hidden),
                )
            ),
            output=get("self_attn.o_proj", hidden, heads),
            post_norm=get("post_attention_layernorm", hidden),
            gate_up=torch.cat(
                (get("mlp.gate_proj", inter, hidden), get("mlp.up_proj", inter, hidden))
            ),
            down=get("mlp.down_proj", hidden, inter),
        )

    def named(self, prefix: str, config: ModelConfig) -> dict[str, Tensor]:
        """The same under the Hugging Face names, for saving."""
        head = config.head_size
        kv = config.num_kv_heads * head
        q, k, v = self.qkv.split([config.num_heads * head, kv, kv])
        gate, up = self.gate_up.chunk(2)
        parts = {
            "input_layernorm": self.input_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": self.output,
            "post_attention_layernorm": self.post_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": self.down,
        }
        return {f"{prefix}{name}.weight": t.contiguous() for name, t in parts.items()}


def decoder_layer(
    weights: LayerWeights,
    hidden: Tensor,
    attend: Callable[[Tensor], Tensor],
    eps: float,
    ops: LayerOps = INFERENCE,
) -> Tensor:
    """Run one layer.

    Args:
        hidden: `[B, T, H]`.
        attend: from the fused projection `[B, T, (Hq + 2 Hkv) D]` to attention `[B, T, Hq D]`;
            it owns positions and the cache.

    Returns:
        `[B, T, H]`.
    """
    x = ops.rms_norm(hidden, weights.input_norm, eps)
    attention = attend(ops.linear(x, weights.qkv, None))
    hidden = ops.linear(attention, weights.output, hidden)
    x = ops.rms_norm(hidden, weights.post_norm, eps)
    return ops.linear(ops.swiglu(ops.linear(x, weights.gate_up, None)), weights.down, hidden)
