"""Draft lengths of a batch from Beta posteriors by Thompson sampling, one call a round.

alpha, beta `[B]` float32 (`[B, buckets]` if calibrated); a table of what a round of each draft
length costs; a cap a sequence. The rules stand in `reference/thompson_draft_length.py` and in
`Rule`. CPU and CUDA give the same lengths. Moves a few numbers a sequence: its price is its launch.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import thompson_draft_length_cpu
from eesd_kernels._cuda import thompson_draft_length_cuda
from eesd_kernels._library import register
from eesd_kernels.laws import Rule

thompson_draft_length_op = register(
    "thompson_draft_length(Tensor alpha, Tensor beta, Tensor cap, int rule, Tensor costs,"
    " Tensor seed, Tensor position, Tensor(a!)? credit=None) -> Tensor",
    reference=reference.thompson_draft_length,
    cpu=thompson_draft_length_cpu,
    cuda=thompson_draft_length_cuda,
    cuda_is="CUDA",
    fake=lambda alpha, beta, cap, *_, **__: cap.new_empty(cap.shape),
)

_RULES = frozenset(Rule)


def thompson_draft_length(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    rule: Rule | int,
    costs: Tensor,
    seed: Tensor,
    position: Tensor,
    credit: Tensor | None = None,
) -> Tensor:
    """Choose each sequence's draft length.

    Args:
        alpha, beta: float32, posterior of the chance that a draft token is accepted: `[B]`, or
            `[B, buckets]` with the calibrated rule.
        cap: `[B]` int32, longest draft allowed; -1 takes a sequence out of the round.
        rule: see `Rule`.
        costs: `[K+1]` float32 above 0, cost of a round of draft length 0 to K, in any unit; K is
            at least the largest cap (on CUDA a larger cap counts as K). Read by cost and
            calibrated.
        seed: `[B]` int64. position: `[B]` int32, cached tokens when the round begins.
        credit: `[B]` float32, written: plain steps (rounds of length 0) that a sequence may still
            lose to drafts; None: no bound. Read by cost and calibrated, which charge the round
            to it: `C(L) / C(0)` of the longest draft L, shared by the sequences of the round.
            `thompson_update` adds what the tokens bring.

    Returns:
        `[B]` int32 draft lengths, 0 to cap; 0 for a sequence out of the round, or with a
        posterior that is not positive and finite (constant reads no posterior) or a credit that
        is not finite.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("thompson_draft_length")
    if rule not in _RULES:
        names = ", ".join(f"{r.value} ({r.name.lower()})" for r in Rule)
        raise ValueError(f"thompson_draft_length: rule: expected {names}, got {rule}")
    shape = ("B", "buckets") if rule == Rule.CALIBRATED else ("B",)
    check.tensor("alpha", alpha, shape, torch.float32)
    check.tensor("beta", beta, shape, torch.float32)
    check.tensor("cap", cap, ("B",), torch.int32)
    check.tensor("costs", costs, ("K+1",), torch.float32)
    check.tensor("seed", seed, ("B",), torch.int64)
    check.tensor("position", position, ("B",), torch.int32)
    if credit is not None:
        check.tensor("credit", credit, ("B",), torch.float32)
    check.size("K+1", 1)
    if rule == Rule.CALIBRATED:
        check.size("buckets", 1)
    if cap.device.type == "cpu" and cap.numel() and int(cap.max()) >= costs.shape[0]:
        raise ValueError(
            f"thompson_draft_length: costs: expected at least {int(cap.max()) + 1} entries "
            f"(largest cap {int(cap.max())}), got {costs.shape[0]}"
        )
    return thompson_draft_length_op(alpha, beta, cap, int(rule), costs, seed, position, credit)
