"""What the tests of `generate` share: prompts, padding, and models that agree with their exit."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eesd import Model, load


def scale_rest(model: Model, factor: float) -> Model:
    """Shrink what layers N.. add: at 0 the bare exit is always right, near 0 mostly."""
    backbone, head = model.backbone, model.exit_head
    assert head is not None
    first = head.config.exit_layer
    backbone.layers = backbone.layers[:first] + tuple(
        layer._replace(output=layer.output * factor, down=layer.down * factor)
        for layer in backbone.layers[first:]
    )
    return model


def half_agreeing_folder(make_llama: Callable[..., Path], folder: Path, factor: float) -> Path:
    """The same on disk, for an exit after layer 1, so that transformers loads that model too."""
    weights = load_file(make_llama(folder) / "model.safetensors")
    for name in weights:
        if ".layers.0." not in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def narrow_model(make_llama: Callable[..., Path], folder: Path, vocab: int) -> Model:
    """Three layers, a bare exit after the first that is right about half the time."""
    make_llama(
        folder, vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        max_position_embeddings=16,
    )  # fmt: skip
    (folder / "tokenizer.json").unlink()
    model = load(folder, assistant_early_exit=1, device="cpu", dtype="float32")
    model.backbone.lm_head = model.backbone.lm_head / 3
    assert model.exit_head is not None
    model.exit_head.lm_head = model.backbone.lm_head
    return model


def tiny_prompts(count: int, longest: int = 12, seed: int = 0, vocab: int = 64) -> list[Tensor]:
    """Random ids `[P_b]` without the end of text, 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab, (n,), generator=generator) for n in lengths]


def left_pad(prompts: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts `[P_b]` as a batch and its mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = 1
    return ids, mask
