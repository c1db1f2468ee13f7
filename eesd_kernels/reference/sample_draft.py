"""Draw children from the sparse exit law `q = softmax(values / temperature)` over k candidates.

The perturbed score of candidate x is `values_x / temperature - log E_x` with the race noise of
(position, id); the n largest, in descending order, are a draw of n children without replacement
(Gumbel top-n; n = 1 is a draw from q). Temperature 0 and the deterministic law take the n best.
The coupled law uses the target's noise, without the round base, and no parent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eesd_kernels.laws import Law, Purpose
from eesd_kernels.reference.philox import philox_words, race_exponential


def sample_draft(
    values: Tensor,
    ids: Tensor,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None = None,
    words: Callable[..., Tensor] = philox_words,
) -> tuple[Tensor, Tensor]:
    rows, k = values.shape
    child_ids = torch.full((rows, n), -1, dtype=torch.int32, device=values.device)
    probs = torch.zeros(rows, k, dtype=torch.float32, device=values.device)
    for r in range(rows):
        v, candidate = values[r].double(), ids[r]
        valid = (candidate >= 0) & (v > -torch.inf) & ~v.isnan()
        if not bool(valid.any()):
            continue
        t = float(temperature[r])
        score = v.masked_fill(~valid, -torch.inf)
        if t > 0:
            score = score / t
            probs[r] = score.softmax(-1).float()
        else:
            probs[r, int(score.argmax())] = 1.0
        if t > 0 and int(law[r]) != Law.DETERMINISTIC:
            coupled = int(law[r]) == Law.COUPLED
            one = slice(r, r + 1)
            drawn = words(
                seed[one],
                position[one],
                torch.zeros_like(base[one]) if coupled else base[one],
                Purpose.TARGET if coupled else Purpose.DRAFT,
                candidate.clamp(min=0),
                None if coupled or parent is None else parent[one],
            )[0]
            score = score - race_exponential(drawn).log()
        best = score.sort(descending=True, stable=True).indices[:n]
        best = best[valid[best]]
        child_ids[r, : len(best)] = candidate[best]
    return child_ids, probs
