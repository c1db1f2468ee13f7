"""How the tokens of a call are chosen, as the ops read it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eesd_kernels import Law

CANDIDATES = 32
"""Exit logits that a sampled draft, or one that processors reorder, is chosen from."""


@dataclass
class Sampling:
    """How tokens are chosen, one value a sequence, `[B]`; a filter that is off in all is None."""

    law: Tensor  # int32, see eesd_kernels.Law
    temperature: Tensor  # float32, 0 is greedy
    top_k: Tensor | None  # int32
    top_p: Tensor | None  # float32
    min_p: Tensor | None  # float32
    seed: Tensor  # int64
    draft_candidates: int  # k of the sparse draft law
    tests_law: bool  # verification needs the draft law; greedy and coupled tokens are matched

    @classmethod
    def uniform(
        cls,
        seeds: list[int],
        device: torch.device,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        law: Law = Law.SAMPLED,
        draft_candidates: int | None = None,
    ) -> "Sampling":
        """The same rule for each sequence, a seed each.

        draft_candidates: None for as many as the rule needs: one where it is greedy.
        """
        n, samples = len(seeds), temperature > 0

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        return cls(
            law=full(int(law), torch.int32),
            temperature=full(temperature, torch.float32),
            top_k=full(top_k, torch.int32) if samples and top_k > 0 else None,
            top_p=full(top_p, torch.float32) if samples and top_p < 1 else None,
            min_p=full(min_p, torch.float32) if samples and min_p > 0 else None,
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
            draft_candidates=draft_candidates or (CANDIDATES if samples else 1),
            tests_law=samples and law is not Law.COUPLED,
        )
