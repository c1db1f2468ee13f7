"""What a head is worth, from held-out text: agreement, acceptance length, the Beta prior."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from eesd.distill.losses import chunks
from eesd.distill.settings import CHANCE_MARGIN, DRAFT_LENGTH
from eesd.distill.student import Student

# An acceptance rate is taken over stretches about as long as an answer.
PRIOR_STRETCH = 256
# A prior worth less than 2 observations says nothing, one of over 32 outweighs the first ten rounds
# of a text that is unlike the held-out one.
PRIOR_STRENGTH = (2.0, 32.0)
PRIOR_MEAN = (0.02, 0.98)


class Evaluation(NamedTuple):
    """See `DistillResult` for the words; loss is the training loss, in nats for kl."""

    loss: float
    agreement: float
    sampled_acceptance: float
    mean_acceptance_length: float
    most_frequent: float
    prior_alpha: float
    prior_beta: float

    @property
    def near_chance(self) -> bool:
        """Whether the agreement is hardly above that of guessing one token."""
        return self.agreement < self.most_frequent + CHANCE_MARGIN * (1 - self.most_frequent)


@torch.no_grad()
def evaluate(
    student: Student, windows: Tensor, *, batch: int, kind: str, temperature: float
) -> Evaluation:
    """Measure on sequences `[n, T]`, uncompiled: a shorter last batch would compile anew."""
    student = student.eager()
    head, teacher_head = student.lm_head, student.backbone.lm_head
    loss = torch.zeros((), dtype=torch.float64, device=windows.device)
    overlap = torch.zeros_like(loss)
    frequent = loss.new_zeros(len(teacher_head))
    agree = []
    for ids in windows.split(batch):
        at_exit, teacher = student.teach(ids)
        hidden, teacher = student.exit(at_exit).flatten(0, 1), teacher.flatten(0, 1)
        weight, other = head.to(hidden.dtype), teacher_head.to(teacher.dtype)
        for rows in chunks(len(hidden), len(other)):
            ours, theirs = linear(hidden[rows], weight), linear(teacher[rows], other)
            loss += student.of_chunk(ours, theirs, kind, temperature)[0]
            best = theirs.argmax(-1)
            agree.append(ours.argmax(-1) == best)
            frequent.scatter_add_(0, best, torch.ones_like(best, dtype=frequent.dtype))
            wide = torch.promote_types(ours.dtype, torch.float32)
            overlap += torch.minimum(ours.to(wide).softmax(-1), theirs.to(wide).softmax(-1)).sum()
    agreed = torch.cat(agree).view(windows.shape).cpu()
    rates, length = draft_acceptance(agreed)
    alpha, beta = beta_prior(rates, min(PRIOR_STRETCH, agreed.shape[1]))
    return Evaluation(
        loss=float(loss) / agreed.numel(),
        agreement=float(agreed.double().mean()),
        sampled_acceptance=float(overlap) / agreed.numel(),
        mean_acceptance_length=length,
        most_frequent=float(frequent.max() / frequent.sum()),
        prior_alpha=alpha,
        prior_beta=beta,
    )


def draft_acceptance(agreed: Tensor, limit: int = DRAFT_LENGTH) -> tuple[Tensor, float]:
    """Simulate a greedy draft of `limit` tokens from every position of the text.

    Args:
        agreed: bool `[n, T]`: the exit's best token is the backbone's.

    Returns:
        Accepted over observed draft tokens of each stretch of PRIOR_STRETCH positions, float64
        (what comes after a rejection is unobserved); and the mean acceptance length, 1 + accepted.
        Drafts that would leave the text are left out.
    """
    limit = min(limit, agreed.shape[1])
    drafts = agreed.unfold(1, limit, 1)  # [n, T - limit + 1, limit]
    accepted = drafts.long().cumprod(-1).sum(-1)
    observed = (accepted + 1).clamp(max=limit)
    stretch = min(PRIOR_STRETCH, accepted.shape[1])
    whole = accepted.shape[1] // stretch * stretch
    parts = [t[:, :whole].reshape(-1, stretch).sum(-1).double() for t in (accepted, observed)]
    return parts[0] / parts[1], 1 + float(accepted.double().mean())


def beta_prior(rates: Tensor, observations: int) -> tuple[float, float]:
    """Beta(alpha, beta) with the mean and variance of the rates between stretches of text.

    The variance that `observations` draws a stretch make by themselves is taken off first. The
    total strength alpha + beta is kept within PRIOR_STRENGTH, the mean within PRIOR_MEAN.
    """
    mean = min(max(float(rates.mean()), PRIOR_MEAN[0]), PRIOR_MEAN[1])
    bernoulli = mean * (1 - mean)
    variance = float(rates.var()) if len(rates) > 1 else 0.0
    between = variance - bernoulli / observations
    strength = bernoulli / between - 1 if between > 0 else PRIOR_STRENGTH[1]
    strength = min(max(strength, PRIOR_STRENGTH[0]), PRIOR_STRENGTH[1])
    if len(rates) == 1:
        strength = PRIOR_STRENGTH[0]  # one stretch knows no spread
    return round(mean * strength, 4), round((1 - mean) * strength, 4)
