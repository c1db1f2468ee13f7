"""The exact law of short texts of a narrow model, by running every prefix."""

import itertools

import torch
from torch import Tensor

import eesd
from eesd.cache import Block


@torch.inference_mode()
def prefix_logits(model: eesd.Model, first: int, length: int) -> tuple[Tensor, Tensor]:
    """All contexts of `length` tokens that begin with `first`, and the logits behind each prefix.

    Returns int64 `[n, length]` and float32 `[n, length, V]`, n = V ** (length - 1), on the CPU;
    one cached block of the engine's own ops, as verification runs it.
    """
    backbone = model.backbone
    vocab = backbone.config.vocab_size
    behind = torch.tensor(list(itertools.product(range(vocab), repeat=length - 1)))
    ids = torch.cat((torch.full((len(behind), 1), first), behind.long()), 1).to(backbone.device)
    cache = backbone.new_cache(len(ids), length, exit_layers=0)
    start = torch.zeros(len(ids), dtype=torch.int32, device=backbone.device)
    hidden = backbone.run_layers(
        backbone.embed(ids), 0, backbone.config.num_layers, cache, Block(start, start + length)
    )
    return ids.cpu(), backbone.logits(hidden).float().cpu()


def joint_law(conditional: Tensor) -> Tensor:
    """From probabilities `[n, length, V]` behind each prefix to those of all texts, `[V] * length`.

    Contexts are in the order of `prefix_logits`.
    """
    _, length, vocab = conditional.shape
    law = torch.ones((vocab,) * length, dtype=torch.float64)
    for place in range(length):
        every = conditional[:, place].double().view((vocab,) * length)
        # By context and token; later tokens of the context do not matter.
        index = (slice(None),) * place + (0,) * (length - 1 - place)
        law = law * every[index][(...,) + (None,) * (length - 1 - place)]
    return law
