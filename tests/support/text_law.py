"""The exact law of short texts of a narrow model, by enumeration, and a test against it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.exact_texts import joint_law, prefix_logits
from bench.joint_tables import chi_square
from eesd import Model

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


def exact_law(
    model: Model, length: int, eos: int | None = None, edit: Edit | None = None, **rule: float
) -> Tensor:
    """Probability `[V] * length` of every text behind the prompt, by enumeration in float32.

    A text is filled up with its end of text where it ends before. `edit` is a logits processor.
    """
    rule = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rule}
    ids, logits = prefix_logits(model, PROMPT, length)
    conditional = torch.empty(*logits.shape, dtype=torch.float64)
    for place in range(length):
        rows = logits[:, place]
        if edit is not None:
            pairs = zip(ids[:, : place + 1], rows, strict=True)
            rows = torch.cat([edit(prefix[None], row[None]) for prefix, row in pairs])
        conditional[:, place] = filtered(rows, **rule)  # type: ignore[arg-type]
        if eos is not None and place > 0:
            ended = (ids[:, 1 : place + 1] == eos).any(1)
            conditional[ended, place] = one_hot(torch.tensor(eos), VOCAB).double()
    law = joint_law(conditional)
    assert law.sum() == pytest.approx(1.0)
    return law


def p_value(texts: Tensor, law: Tensor) -> float:
    """Chi-square of texts `[n, length]`; rare cells are merged to an expectation of 5."""
    length = texts.shape[1]
    weights = VOCAB ** torch.arange(length - 1, -1, -1)
    counts = torch.bincount((texts * weights).sum(1), minlength=law.numel())
    assert counts[law.flatten() == 0].sum() == 0, "a text that has no probability"
    fit = chi_square(counts, law)
    assert fit.degrees >= 10
    return fit.p_value
