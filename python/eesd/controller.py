"""The draft-length controller: a Beta posterior a sequence, and a rule that reads it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eesd.allowance import DEFAULT_MAX_SLOWDOWN, Allowance
from eesd.posterior import Posterior
from eesd_kernels import Rule
from eesd_kernels.thompson_draft_length import thompson_draft_length_op
from eesd_kernels.thompson_look import thompson_look_op
from eesd_kernels.thompson_update import thompson_update_op

SCHEDULES = {
    "thompson": Rule.COST,
    "cost": Rule.COST,
    "calibrated": Rule.CALIBRATED,
    "bernoulli": Rule.BERNOULLI,
    "constant": Rule.CONSTANT,
}
"""Values of `num_assistant_tokens_schedule`. `thompson`, the default, is the cost rule: on recorded
traces the calibrated rule is no quicker on average, and costs more where drafts are hopeless
(`controller_replay.json`)."""

DEFAULT_DISCOUNT = 0.998
"""Weight of a round on the next. A posterior that forgets faster goes back to its prior, and
explores a hopeless head for ever (`python -m bench.controller_replay --discount 0.98`)."""

PRIOR_WEIGHT = 0.5
"""Share of the measured prior's strength that a fresh posterior starts with, so that a head that
does not fit a text is dropped sooner (`bench.controller_replay --prior` tries others)."""


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


BUCKETS = 8
"""Posteriors of the calibrated rule, one for each eighth of the exit's top probability."""


LEAST = 1e-30
"""The least parameter of a posterior that is returned."""


class Controller:
    """Decides draft lengths for a batch; `max_draft` 0 is plain decoding.

    Most rules plan a round's lengths up front. The calibrated rule decides token by token, from the
    exit's top probability before the draw. Both answer the same three questions: `plan` before the
    round, `looks` before each exit step, `include` after it.
    """

    def __init__(
        self,
        batch: int,
        device: torch.device,
        *,
        rule: Rule,
        max_draft: int,
        prior: tuple[float, float],
        costs: Tensor | None,
        exit_cost: float = 0.0,
        discount: float = DEFAULT_DISCOUNT,
        posterior: Posterior | None = None,
        shared: bool = False,
        threshold: float = 0.0,
        max_slowdown: float | None = DEFAULT_MAX_SLOWDOWN,
    ) -> None:
        """prior, discount: of the posterior. posterior: where it starts, None: at the prior.

        shared: one posterior for all sequences, kept in equal rows. threshold: least top
        probability of the exit at which a token is drafted. max_slowdown: see `Allowance`; None:
        no bound. It binds the rules that weigh costs.
        """
        self.rule, self.max_draft, self.discount = rule, max_draft, discount
        self.shared, self.threshold = shared, threshold
        # Only the rules that weigh costs read them.
        self.costs = torch.ones(max_draft + 1, device=device) if costs is None else costs
        calibrated = rule is Rule.CALIBRATED
        self.exit_cost = exit_cost if calibrated else 0.0
        self.credit: Tensor | None = None
        self._token_credit = 1.0
        self._planned = torch.zeros(batch, dtype=torch.int32, device=device)
        self._looked = 0  # exit steps of the round
        if costs is not None and max_slowdown is not None and rule in (Rule.COST, Rule.CALIBRATED):
            start, self._token_credit, limit = Allowance.of(
                max_slowdown, float(costs.max() / costs[0])
            )
            self.credit = torch.full((batch,), start, dtype=torch.float32, device=device)
            # A tensor, since captured rounds serve costs that are measured on themselves.
            self._credit_limit = torch.full_like(self.credit, limit)
        shape, split = ((batch, BUCKETS), BUCKETS) if calibrated else ((batch,), 1)
        self.prior_alpha, self.prior_beta = (
            torch.full(shape, value / split, dtype=torch.float32, device=device) for value in prior
        )
        self.alpha, self.beta = self.prior_alpha.clone(), self.prior_beta.clone()
        if posterior is not None:
            self._start_from(posterior)
        self._bucket: Tensor | None = None
        if calibrated:
            self._bucket = torch.full((batch, max_draft), -1, dtype=torch.int32, device=device)
            self._run = torch.zeros(batch, 3, dtype=torch.float32, device=device)
            self._looking = torch.zeros(batch, dtype=torch.int32, device=device)
            self._unread = torch.zeros(batch, dtype=torch.float32, device=device)

    @property
    def reads_certainty(self) -> bool:
        """Whether draft lengths depend on the exit's top probability."""
        return self._bucket is not None or self.threshold > 0

    def plan(self, cap: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """Draft lengths `[B]` int32 known so far, 0 to cap; a cap of -1 leaves a sequence out."""
        if self.max_draft == 0:
            return torch.zeros_like(cap)
        if self._bucket is not None:
            self._round = cap, seed, position
            return self._decide(torch.zeros_like(cap), 0, self._unread)
        self._looked = 0
        length = thompson_draft_length_op(
            self.alpha, self.beta, cap, int(self.rule), self.costs, seed, position, self.credit
        )
        if self.threshold > 0:
            self._planned.copy_(length)
        return length

    def looks(self, drafted: Tensor, step: int) -> bool:
        """Whether exit step `step` (1 for the first draft token) runs for any sequence."""
        if self._bucket is not None:
            return step <= self.max_draft and bool(self._looking.any())
        return step <= int(drafted.max())

    def include(self, drafted: Tensor, step: int, top_prob: Tensor) -> Tensor:
        """Draft lengths after the exit's look at token `step`, which is not drawn yet."""
        self._looked = step
        if self.threshold > 0:
            sure = top_prob >= self.threshold
            top_prob = torch.where(sure, top_prob, -1.0)  # which no bucket holds
            drafted = torch.where(sure, drafted, drafted.clamp(max=step - 1))
        return drafted if self._bucket is None else self._decide(drafted, step, top_prob)

    def stop(self, drafted: Tensor, ended: Tensor, step: int) -> Tensor:
        """Draft lengths where the sequences in `ended` `[B]` draft nothing after token `step`."""
        if self._bucket is not None:
            self._looking.masked_fill_(ended, 0)
            return drafted
        return torch.where(ended, drafted.clamp(max=step), drafted)

    def update(self, drafted: Tensor, accepted: Tensor) -> None:
        """Fold in a round's outcome; `drafted` is -1 where a sequence took no part.

        A shared posterior takes in all sequences' tokens, and is discounted once:
        `alpha = a0 + g (alpha - a0) + sum_b m_b`, `beta = b0 + g (beta - b0) + sum_b [m_b < l_b]`.
        """
        if not self.max_draft:
            return
        if self.threshold > 0 and self.credit is not None and self._bucket is None:
            # Paid for what was planned; the threshold may have ended the round at a look.
            looked = self.costs[self._looked]
            spared = (self.costs.take(self._planned.max().long()) - looked) / self.costs[0]
            self.credit += torch.where(drafted >= 0, spared, 0.0)
        alpha, beta, discount = self.alpha, self.beta, self.discount
        prior_alpha, prior_beta = self.prior_alpha, self.prior_beta
        if self.shared:  # each sequence's own counts first, over nothing
            prior_alpha = prior_beta = torch.zeros_like(alpha)
            alpha, beta, discount = prior_alpha.clone(), prior_beta.clone(), 1.0
        thompson_update_op(
            alpha, beta, prior_alpha, prior_beta, drafted, accepted, discount, self._bucket,
            self.credit, self._token_credit,
        )  # fmt: skip
        if self.credit is not None:
            torch.minimum(self.credit, self._credit_limit, out=self.credit)
        if self.shared:
            for value, prior, counts in (
                (self.alpha, self.prior_alpha, alpha),
                (self.beta, self.prior_beta, beta),
            ):
                value.copy_(prior + self.discount * (value - prior) + counts.sum(0))

    def posterior(self) -> Posterior:
        """A copy of what is known now."""
        # Under a prior that is larger by far, float32 may round a small value to 0.
        return Posterior(self.alpha.clamp(min=LEAST), self.beta.clamp(min=LEAST))

    def _start_from(self, given: Posterior) -> None:
        """Take a posterior of one sequence or of each."""
        batch, buckets = len(self.alpha), BUCKETS if self.rule is Rule.CALIBRATED else None
        if given.buckets != buckets:
            want, got = (
                f"{n} buckets a sequence" if n else "one Beta law a sequence"
                for n in (buckets, given.buckets)
            )
            raise ValueError(
                f"assistant_posterior: expected {want} for the schedule {self.rule.name.lower()}, "
                f"got {got}"
            )
        if given.alpha.device != self.alpha.device:
            raise ValueError(
                f"assistant_posterior: expected device {self.alpha.device}, "
                f"got {given.alpha.device}; see Posterior.to"
            )
        if len(given) not in (1, batch):
            raise ValueError(
                f"assistant_posterior: expected one of {batch} sequences, or of one, "
                f"got {len(given)}"
            )
        for value, start in ((self.alpha, given.alpha), (self.beta, given.beta)):
            if self.shared and not torch.equal(start, start[:1].expand_as(start)):
                raise ValueError(
                    "assistant_posterior: expected equal rows to share, got different ones; "
                    "see Posterior.sequence"
                )
            value.copy_(start)

    def _decide(self, drafted: Tensor, step: int, top_prob: Tensor) -> Tensor:
        cap, seed, position = self._round
        length = drafted.clone()
        thompson_look_op(
            self.alpha, self.beta, cap, self.costs, self.exit_cost, seed, position, step, top_prob,
            length, self._bucket, self._run, self._looking, self.credit,
        )  # fmt: skip
        return length
