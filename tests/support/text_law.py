"""The exact law of short texts of a narrow model, by enumeration, and a test against it."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from eesd import Model
from eesd.cache import Block

VOCAB, PROMPT = 7, 3
LEAST = 1e-3
"""The p-value below which a law is refused. Seeds are fixed, so a pass is a pass for ever."""

Edit = Callable[[Tensor, Tensor], Tensor]


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities `[n, V]`, one id after the other from the likeliest on, as documented."""
    out = torch.zeros_like(logits, dtype=torch.float64)
    for row, target in zip(logits.double() / temperature, out, strict=True):
        kept = row.argsort(descending=True)[: top_k or VOCAB]
        p = row[kept].softmax(0)
        before = torch.cat((p.new_zeros(1), p.cumsum(0)[:-1]))
        kept, p = kept[before < top_p], p[before < top_p]
        kept, p = kept[p >= min_p * p[0]], p[p >= min_p * p[0]]
        target[kept] = p / p.sum()
    return out


@torch.inference_mode()
def exact_law(
    model: Model, length: int, eos: int | None = None, edit: Edit | None = None, **rule: float
) -> Tensor:
    """Probability `[V] * length` of every text behind the prompt, by enumeration in float32.

    A text is filled up with its end of text where it ends before. `edit` is a logits processor.
    """
    backbone = model.backbone
    rule = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rule}
    contexts = torch.tensor(list(itertools.product(range(VOCAB), repeat=length - 1)))
    ids = torch.cat((torch.full((len(contexts), 1), PROMPT), contexts), 1)
    cache = backbone.new_cache(len(ids), length, exit_layers=0)
    start = torch.zeros(len(ids), dtype=torch.int32)
    hidden = backbone.run_layers(
        backbone.embed(ids), 0, backbone.config.num_layers, cache, Block(start, start + length)
    )
    logits = backbone.logits(hidden)
    law = torch.ones((VOCAB,) * length, dtype=torch.float64)
    for place in range(length):
        rows = logits[:, place]
        if edit is not None:
            pairs = zip(ids[:, : place + 1], rows, strict=True)
            rows = torch.cat([edit(prefix[None], row[None]) for prefix, row in pairs])
        p = filtered(rows, **rule)  # type: ignore[arg-type]
        if eos is not None and place > 0:
            ended = (contexts[:, :place] == eos).any(1)
            p[ended] = torch.nn.functional.one_hot(torch.tensor(eos), VOCAB).double()
        shape = (VOCAB,) * (length - 1)
        every = p.view(*shape, VOCAB)  # by context and token; later context tokens do not matter
        index = (slice(None),) * place + (0,) * (length - 1 - place)
        conditional = every[index]
        law = law * conditional[(...,) + (None,) * (length - 1 - place)]
    assert law.sum() == pytest.approx(1.0)
    return law


def p_value(texts: Tensor, law: Tensor) -> float:
    """Chi-square of texts `[n, length]`; rare cells are merged to an expectation of 5."""
    length = texts.shape[1]
    weights = VOCAB ** torch.arange(length - 1, -1, -1)
    observed = torch.bincount((texts * weights).sum(1), minlength=law.numel()).numpy()
    expected = law.flatten().numpy() * len(texts)
    assert observed[expected == 0].sum() == 0, "a text that has no probability"
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    rare = int(np.searchsorted(np.cumsum(expected), 5.0)) + 1
    rare = max(rare, int((expected < 5).sum()))
    cells = [(observed[:rare].sum(), expected[:rare].sum())]
    cells += list(zip(observed[rare:], expected[rare:], strict=True))
    counts, means = np.array([c for c in cells if c[1] > 0], dtype=np.float64).T
    assert len(counts) > 10
    return float(stats.chisquare(counts, means * counts.sum() / means.sum()).pvalue)
