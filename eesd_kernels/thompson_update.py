"""Fold a round's outcome into the Beta posteriors, in place; the rule stands in the reference."""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._library import register

thompson_update_op = register(
    "thompson_update(Tensor(a!) alpha, Tensor(b!) beta, Tensor prior_alpha, Tensor prior_beta,"
    " Tensor drafted, Tensor accepted, float discount) -> ()",
    reference=reference.thompson_update,
    fake=lambda *_: None,
)


def thompson_update(
    alpha: Tensor,
    beta: Tensor,
    prior_alpha: Tensor,
    prior_beta: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    *,
    discount: float = 1.0,
) -> None:
    """Update posteriors after a round.

    Args:
        alpha, beta: `[B]` float32, written in place.
        prior_alpha, prior_beta: `[B]` float32, what the discount forgets towards.
        drafted: `[B]` int32 draft lengths; negative: the sequence took no part.
        accepted: `[B]` int32, at most drafted.
        discount: 0 to 1; 1 forgets nothing.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("thompson_update")
    for name, value in (
        ("alpha", alpha),
        ("beta", beta),
        ("prior_alpha", prior_alpha),
        ("prior_beta", prior_beta),
    ):
        check.tensor(name, value, ("B",), torch.float32)
    check.tensor("drafted", drafted, ("B",), torch.int32)
    check.tensor("accepted", accepted, ("B",), torch.int32)
    check.number("discount", discount, 0.0, 1.0)
    thompson_update_op(alpha, beta, prior_alpha, prior_beta, drafted, accepted, discount)
