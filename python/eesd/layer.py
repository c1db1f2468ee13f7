"""One pre-norm decoder layer, the building block of backbones and of exit heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eesd.config import ModelConfig
from eesd.weights import WeightFolder
from eesd_kernels import reference
from eesd_kernels.linear import linear_op
from eesd_kernels.rms_norm import rms_norm_op


class LayerOps(NamedTuple):
    """The ops of a layer besides attention.

    linear takes x, weight, residual, norm_weight, eps and swiglu: what stands before and after a
    product costs no pass of its own where its kernel can do it.
    """

    linear: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]


INFERENCE = LayerOps(linear_op, rms_norm_op)
TRAINING = LayerOps(reference.linear, reference.rms_norm)
"""Plain PyTorch, which autograd and torch.compile see through."""


class LayerWeights(NamedTuple):
    """A layer's weights, and the window of its attention; what its family lacks is None.

    Projections that read the same input are fused: q, k, v in one weight, gate and up in one.
    """

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    output: Tensor  # [H, Hq D]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [H, I]
    qkv_bias: Tensor | None = None  # [(Hq + 2 Hkv) D]
    output_bias: Tensor | None = None  # [H]
    q_norm: Tensor | None = None  # [D]
    k_norm: Tensor | None = None  # [D]
    window: int | None = None  # positions that a row sees, its own among them; None: all

    @classmethod
    def load(
        cls,
        folder: WeightFolder,
        prefix: str,
        config: ModelConfig,
        window: int | None,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> "LayerWeights":
        """Read a layer under its Hugging Face names: `<prefix>self_attn.q_proj.weight`, ...

        A tensor of the layer that the config leaves no place for would change what it computes,
        and is refused.
        """
        hidden, inter, head = config.hidden_size, config.intermediate_size, config.head_size
        heads, kv_heads = config.num_heads * head, config.num_kv_heads * head
        unread = {name for name in folder.names if name.startswith(prefix)}

        def get(name: str, *shape: int) -> Tensor:
            unread.discard(prefix + name)
            return folder.tensor(prefix + name, shape, device, dtype)

        def qkv(kind: str, *columns: int) -> Tensor:
            sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
            return torch.cat(
                [get(f"self_attn.{x}_proj.{kind}", n, *columns) for x, n in sizes.items()]
            )

        layer = cls(
            input_norm=get("input_layernorm.weight", hidden),
            qkv=qkv("weight", hidden),
            output=get("self_attn.o_proj.weight", hidden, heads),
            post_norm=get("post_attention_layernorm.weight", hidden),
            gate_up=torch.cat([get(f"mlp.{x}_proj.weight", inter, hidden) for x in ("gate", "up")]),
            down=get("mlp.down_proj.weight", hidden, inter),
            qkv_bias=qkv("bias") if config.qkv_bias else None,
            output_bias=get("self_attn.o_proj.bias", hidden) if config.output_bias else None,
            q_norm=get("self_attn.q_norm.weight", head) if config.qk_norm else None,
            k_norm=get("self_attn.k_norm.weight", head) if config.qk_norm else None,
            window=window,
        )
        unread = {name for name in unread if not name.endswith("rotary_emb.inv_freq")}
        if unread:
            raise ValueError(
                f"{folder.folder}: tensor {min(unread)!r} is not supported "
                f"({config.architecture} with this config has none)"
            )
        return layer

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by field."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerWeights":
        """The same layer with each tensor replaced."""
        parts: dict[str, Any] = self._asdict()
        parts.update({name: function(x) for name, x in self.tensors().items()})
        return LayerWeights(**parts)

    def named(self, prefix: str, config: ModelConfig) -> dict[str, Tensor]:
        """The tensors under the Hugging Face names, for saving."""
        kv = config.num_kv_heads * config.head_size
        sizes = [config.num_heads * config.head_size, kv, kv]
        parts = {
            "input_layernorm.weight": self.input_norm,
            "self_attn.o_proj.weight": self.output,
            "self_attn.o_proj.bias": self.output_bias,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
            "post_attention_layernorm.weight": self.post_norm,
            "mlp.down_proj.weight": self.down,
        }
        for kind, fused in (("weight", self.qkv), ("bias", self.qkv_bias)):
            if fused is not None:
                names = [f"self_attn.{x}_proj.{kind}" for x in "qkv"]
                parts.update(zip(names, fused.split(sizes), strict=True))
        parts.update(
            zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), self.gate_up.chunk(2), strict=True)
        )
        return {prefix + name: t.contiguous() for name, t in parts.items() if t is not None}


def project_qkv(
    weights: LayerWeights, hidden: Tensor, eps: float, ops: LayerOps = INFERENCE
) -> Tensor:
    """What attention and the cache take of `[B, T, H]`: q, k and v `[B, T, (Hq + 2 Hkv) D]`."""
    qkv = ops.linear(hidden, weights.qkv, None, weights.input_norm, eps)
    if weights.qkv_bias is not None:
        qkv = qkv + weights.qkv_bias.to(qkv.dtype)
    if weights.q_norm is None or weights.k_norm is None:
        return qkv
    size, width = weights.q_norm.shape[0], weights.output.shape[1]
    q, k, v = qkv.split([width, *[(qkv.shape[-1] - width) // 2] * 2], dim=-1)
    q_rows, k_rows = q.reshape(-1, size), k.reshape(-1, size)
    return torch.cat(
        (
            ops.rms_norm(q_rows, weights.q_norm, eps).view(q.shape),
            ops.rms_norm(k_rows, weights.k_norm, eps).view(k.shape),
            v,
        ),
        dim=-1,
    )


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
        attend: from `project_qkv`'s `[B, T, (Hq + 2 Hkv) D]` to attention `[B, T, Hq D]`; it owns
            positions, the window and the cache.

    Returns:
        `[B, T, H]`.
    """
    attention = attend(project_qkv(weights, hidden, eps, ops))
    hidden = ops.linear(attention, weights.output, hidden)
    if weights.output_bias is not None:
        hidden = hidden + weights.output_bias.to(hidden.dtype)
    x = ops.linear(hidden, weights.gate_up, None, weights.post_norm, eps, True)
    return ops.linear(x, weights.down, hidden)
