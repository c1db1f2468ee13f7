"""Fold a round's outcome into posteriors and credits, in place; the reference has the rule."""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import thompson_update_cpu
from eesd_kernels._cuda import thompson_update_cuda
from eesd_kernels._library import register

thompson_update_op = register(
    "thompson_update(Tensor(a!) alpha, Tensor(b!) beta, Tensor prior_alpha, Tensor prior_beta,"
    " Tensor drafted, Tensor accepted, float discount, Tensor? bucket=None,"
    " Tensor(c!)? credit=None, float token_credit=1.0, float credit_limit=1e300) -> ()",
    reference=reference.thompson_update,
    cpu=thompson_update_cpu,
    cuda=thompson_update_cuda,
    cuda_is="CUDA",
    fake=lambda *_, **__: None,
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
    bucket: Tensor | None = None,
    credit: Tensor | None = None,
    token_credit: float = 1.0,
    credit_limit: float = float("inf"),
) -> None:
    """Update posteriors after a round.

    Args:
        alpha, beta: `[B]` float32, or `[B, buckets]` with `bucket`; written in place.
        prior_alpha, prior_beta: the shape of alpha, float32, what the discount forgets towards.
        drafted: `[B]` int32 draft lengths; negative: the sequence took no part.
        accepted: `[B]` int32, at most drafted.
        discount: 0 to 1; 1 forgets nothing.
        bucket: `[B, K]` int32 as `thompson_look` left it: the bucket of each draft token.
        credit: `[B]` float32, written in place, as the plan left it.
        token_credit: plain steps that each of the round's `accepted + 1` tokens adds to the
            credit; what is above 1 is a sequence's allowance for losing.
        credit_limit: what a sequence may save up, and so lose from any moment on.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("thompson_update")
    shape = ("B",) if bucket is None else ("B", "buckets")
    for name, value in (
        ("alpha", alpha),
        ("beta", beta),
        ("prior_alpha", prior_alpha),
        ("prior_beta", prior_beta),
    ):
        check.tensor(name, value, shape, torch.float32)
    check.tensor("drafted", drafted, ("B",), torch.int32)
    check.tensor("accepted", accepted, ("B",), torch.int32)
    if bucket is not None:
        check.tensor("bucket", bucket, ("B", "K"), torch.int32)
        check.size("buckets", 1)
    if credit is not None:
        check.tensor("credit", credit, ("B",), torch.float32)
    check.number("discount", discount, 0.0, 1.0)
    check.number("token_credit", token_credit, 0.0, float("inf"))
    check.number("credit_limit", credit_limit, 0.0, float("inf"))
    thompson_update_op(
        alpha, beta, prior_alpha, prior_beta, drafted, accepted, discount, bucket, credit,
        float(token_credit), float(credit_limit),
    )  # fmt: skip
