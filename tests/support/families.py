"""Small random models of each family, written by transformers, and their logits here and there."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eesd import Model
from eesd.cache import Block

VOCABULARY = 97
# Few keys are a family's own defaults: the sizes of real models do not fit here.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "initializer_range": 0.25, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
WINDOW = 20
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": QWEN_WINDOWS,
    "Qwen3": {"head_dim": 14, **QWEN_WINDOWS},
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def write(folder: Path, family: str, changes: dict[str, Any] | None = None, **save: Any) -> Path:
    """A folder as transformers writes it: random weights, norms and biases.

    Options besides those of `save_pretrained`: dtype; shrink: factor on what the layers from the
    second on add, near 0 for an exit that is mostly right.
    """
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")
    config = config(**{**BASE, **OF_FAMILY[family], **(changes or {})})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    shrink = save.pop("shrink", 1.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                weight.normal_(std=0.5)
            if ("o_proj" in name or "down_proj" in name) and ".layers.0." not in name:
                weight.mul_(shrink)
    if dtype := save.pop("dtype", None):
        model = model.to(dtype)
    model.save_pretrained(folder, **save)
    return folder


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


@torch.inference_mode()
def native_logits(model: Model, ids: Tensor, rows: int | None = None) -> Tensor:
    """Logits `[B, P, V]`, in blocks of so many rows (None: one block)."""
    backbone, (batch, length) = model.backbone, ids.shape
    cache, out = backbone.new_cache(batch, length, exit_layers=0), []
    for start in range(0, length, rows or length):
        part = ids[:, start : start + (rows or length)]
        full = torch.ones(batch, dtype=torch.int32)
        block = Block(start * full, part.shape[1] * full)
        hidden = backbone.run_layers(
            backbone.embed(part), 0, backbone.config.num_layers, cache, block
        )
        out.append(backbone.logits(hidden))
    return torch.cat(out, 1)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )


@torch.inference_mode()
def transformers_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Its logits `[B, P, V]`."""
    return reference(folder, dtype)(ids).logits
