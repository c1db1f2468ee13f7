"""Models of real shapes with random weights, where no trained ones are at hand: for measuring.

The layers from N on, and the exit head's own layer, add little to the hidden state: their output
projections are scaled so that the exit's best token is the full model's at a chosen rate. Every
matrix is read as in a trained model, so a step costs what it costs there; the text means nothing.
Results on such a model are to be labelled synthetic.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eesd.config import ExitHeadConfig, ModelConfig
from eesd.exit_head import ExitHead
from eesd.layer import TRAINING, LayerWeights
from eesd.loading import Model, target_device, target_dtype
from eesd.models import Llama

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def _llama_2(hidden: int, inter: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        **_LLAMA,
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama_2(4096, 11_008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13_824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28_672, 80, 64, 8),
    "llama-3-8b": {
        **_llama_2(4096, 14_336, 32, 32, 8),
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
}
HEAD_GAIN = 6.0
"""Standard deviation of the logits: the best of 32,000 then leads as a trained model's does."""
PROBE = (8, 128)
"""Random sequences and tokens on which agreement is measured: its standard error is 0.016."""
STEPS = 12


def synthetic(
    shape: str | Mapping[str, Any],
    *,
    agreement: float,
    exit_layer: int,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Make a model of a shape, with an exit head that agrees with it at a chosen rate.

    Args:
        shape: llama-2-7b, llama-2-13b, llama-2-70b, llama-3-8b, or the keys of a Hugging Face
            `config.json` of a supported family.
        agreement: share of positions where the exit's best token is to be the full model's, above
            0 and at most 1. What was reached on random text is in the exit head's
            `config.recipe["measured_agreement"]`; on the text that it writes it may differ.
        exit_layer: N.
        seed: of the weights. device, dtype: as `eesd.load`. Weights are drawn in that dtype on
            that device; no float32 copy is made.

    Raises:
        ValueError: an unknown shape, an unsupported config, or a value out of range.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)} or a config, got {shape!r}")
    if not isinstance(agreement, (int, float)) or not 0 < agreement <= 1:
        raise ValueError(f"agreement: expected above 0, at most 1, got {agreement!r}")
    name = shape if isinstance(shape, str) else "synthetic"
    config = ModelConfig.from_hf(dict(SHAPES[shape] if isinstance(shape, str) else shape), name)
    where = target_device(device)
    made = _Weights(config, seed, where, target_dtype(dtype, config, where))
    embedding = made.matrix(config.vocab_size, config.hidden_size, 1.0)
    # A tied head reads rows of norm sqrt(H): the final norm then gives the gain.
    gain = HEAD_GAIN * config.hidden_size**-0.5
    norm = made.ones(config.hidden_size)
    backbone = Llama(
        config,
        embedding,
        [made.layer(window) for window in config.windows],
        norm * gain if config.tied_head else norm,
        embedding if config.tied_head else made.matrix(config.vocab_size, config.hidden_size, gain),
        made.dtype,
    )
    fingerprint = f"synthetic:{name}:seed={seed}:agreement={agreement}"
    bare = ExitHead.bare(backbone, exit_layer, fingerprint)
    layer = made.layer(config.windows[-1])
    measured = _fit(backbone, layer, exit_layer, float(agreement), seed)
    head = ExitHeadConfig(
        **{
            **bare.config.to_dict(),
            # as heavy as eight tokens seen
            "prior_alpha": 8 * min(max(measured, 0.05), 0.95),
            "prior_beta": 8 * (1 - min(max(measured, 0.05), 0.95)),
            "recipe": {"synthetic": True, "agreement": agreement, "measured_agreement": measured},
        }
    )
    return Model(
        name=f"{name} (synthetic)",
        folder=Path(name),
        backbone=backbone,
        exit_head=ExitHead(backbone, head, layer, backbone.norm, backbone.lm_head),
        tokenizer=None,
        fingerprint=fingerprint,
    )


class _Weights:
    """Draws weights in place, on the device."""

    def __init__(
        self, config: ModelConfig, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, rows: int, columns: int, std: float) -> Tensor:
        empty = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return empty.normal_(0.0, std, generator=self._generator)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def layer(self, window: int | None) -> LayerWeights:
        shape = self.config
        hidden, inter, head = shape.hidden_size, shape.intermediate_size, shape.head_size
        width = shape.num_heads * head
        rows = width + 2 * shape.num_kv_heads * head
        return LayerWeights(
            input_norm=self.ones(hidden),
            qkv=self.matrix(rows, hidden, hidden**-0.5),
            output=self.matrix(hidden, width, width**-0.5),
            post_norm=self.ones(hidden),
            gate_up=self.matrix(2 * inter, hidden, hidden**-0.5),
            down=self.matrix(hidden, inter, inter**-0.5),
            qkv_bias=self.zeros(rows) if shape.qkv_bias else None,
            output_bias=self.zeros(hidden) if shape.output_bias else None,
            q_norm=self.ones(head) if shape.qk_norm else None,
            k_norm=self.ones(head) if shape.qk_norm else None,
            window=window,
        )


@torch.inference_mode()
def _fit(
    backbone: Llama, exit_layer_weights: LayerWeights, first: int, want: float, seed: int
) -> float:
    """Scale the layers from N on by bisection; returns the agreement reached."""
    late = [*backbone.layers[first:], exit_layer_weights]
    generator = torch.Generator(backbone.device).manual_seed(seed + 1)
    count, length = PROBE[0], min(PROBE[1], backbone.config.max_position)
    ids = torch.randint(
        backbone.config.vocab_size, (count, length), generator=generator, device=backbone.device
    )
    hidden = backbone.embed(ids)
    for layer in backbone.layers[:first]:
        hidden = backbone.causal_layer(layer, hidden, TRAINING)

    def best(layers: Sequence[LayerWeights]) -> Tensor:
        h = hidden
        for layer in layers:
            h = backbone.causal_layer(layer, h, TRAINING)
        h = TRAINING.rms_norm(h, backbone.norm, backbone.config.rms_eps)
        return torch.cat([TRAINING.linear(row, backbone.lm_head, None).argmax(-1) for row in h])

    def agreement(scale: float, now: float) -> float:
        for layer in late:
            for x in (layer.output, layer.down):
                x.mul_(scale / now)
        return float((best(late[:-1]) == best(late[-1:])).double().mean())

    low, high, now = 0.0, 1.0, 1.0
    reached = agreement(high, now)
    if reached < want:
        for _ in range(STEPS):
            scale = (low + high) / 2
            reached, now = agreement(scale, now), scale
            if reached >= want:
                low = scale
            else:
                high = scale
    return reached
