"""The draft-length controller: a Beta posterior a sequence, and a rule that reads it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eesd_kernels import Rule
from eesd_kernels.thompson_draft_length import thompson_draft_length_op
from eesd_kernels.thompson_update import thompson_update_op

SCHEDULES = {
    "thompson": Rule.COST,
    "cost": Rule.COST,
    "bernoulli": Rule.BERNOULLI,
    "constant": Rule.CONSTANT,
}
"""Values of `num_assistant_tokens_schedule`; `thompson` is the default rule by another name."""

DEFAULT_DISCOUNT = 0.98
"""Weight of a round on the next: the posterior remembers about fifty rounds."""


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of a round's parts, measured on the real model or given.

    prefix: layers 0..N-1 for one token a sequence. exit: exit layer, head and draw. rest: layers
    N..L-1, head and verification, for 1 to K+1 rows.
    """

    prefix: float
    exit: float
    rest: tuple[float, ...]

    def __post_init__(self) -> None:
        values = (self.prefix, self.exit, *self.rest)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"assistant_costs: expected numbers, got {value!r}")
        if not self.rest or not all(v >= 0 and v < float("inf") for v in values):
            raise ValueError(
                "assistant_costs: expected prefix, exit and rest to be finite and not negative, "
                f"rest not empty, got {self}"
            )
        if self.prefix + self.rest[0] <= 0:
            raise ValueError("assistant_costs: a plain step (prefix + rest[0]) must cost something")

    def rounds(self, max_draft: int, device: torch.device) -> Tensor:
        """`C(l) = (l+1) prefix + l exit + rest[l]` for l in 0..max_draft, `[max_draft+1]`."""
        if len(self.rest) <= max_draft:
            raise ValueError(
                f"assistant_costs: rest: expected at least {max_draft + 1} entries for "
                f"drafts of up to {max_draft} tokens, got {len(self.rest)}"
            )
        costs = [(n + 1) * self.prefix + n * self.exit + self.rest[n] for n in range(max_draft + 1)]
        return torch.tensor(costs, dtype=torch.float32, device=device)


class Controller:
    """Plans draft lengths for a batch; `max_draft` 0 is plain decoding."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        *,
        rule: Rule,
        max_draft: int,
        prior: tuple[float, float],
        costs: Tensor | None,
        discount: float = DEFAULT_DISCOUNT,
    ) -> None:
        self.rule, self.max_draft, self.discount = rule, max_draft, discount
        # Only the cost rule reads them.
        self.costs = torch.ones(max_draft + 1, device=device) if costs is None else costs
        self.prior_alpha = torch.full((batch,), prior[0], dtype=torch.float32, device=device)
        self.prior_beta = torch.full((batch,), prior[1], dtype=torch.float32, device=device)
        self.alpha, self.beta = self.prior_alpha.clone(), self.prior_beta.clone()

    def plan(self, cap: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """Draft lengths `[B]` int32, 0 to cap; a cap of -1 leaves a sequence out."""
        if self.max_draft == 0:
            return torch.zeros_like(cap)
        return thompson_draft_length_op(
            self.alpha, self.beta, cap, int(self.rule), self.costs, seed, position
        )

    def update(self, drafted: Tensor, accepted: Tensor) -> None:
        """Fold in a round's outcome; `drafted` is -1 where a sequence took no part."""
        if self.max_draft:
            thompson_update_op(
                self.alpha, self.beta, self.prior_alpha, self.prior_beta, drafted, accepted,
                self.discount,
            )  # fmt: skip
