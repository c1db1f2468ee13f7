"""The calibrated rule, step by step: whether to look at the exit again, whether to draft.

Called K+1 times a round, all on the device: with `step=0` before the first exit step, with
`step=i` after the i-th and before its draw. Rows with `looking` take the next exit step; a row
whose `length` is i has token i in its draft. `bucket` is what `thompson_update` needs afterwards.

    thompson_look(.., step=0, top_prob=any, ..)
    for i in 1..K:
        the exit layer and head, for rows with looking[b]
        thompson_look(.., step=i, top_prob=softmax(exit logits).max(), ..)
        draw token i, for rows with length[b] == i

It may look at q before the draw and at earlier tokens, so a drawn token is always verified and the
text stays exact. The equations stand in the reference. Moves a few numbers a sequence.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import thompson_look_cpu
from eesd_kernels._cuda import thompson_look_cuda
from eesd_kernels._library import register

thompson_look_op = register(
    "thompson_look(Tensor alpha, Tensor beta, Tensor cap, Tensor costs, float exit_cost,"
    " Tensor seed, Tensor position, int step, Tensor top_prob, Tensor(a!) length,"
    " Tensor(b!) bucket, Tensor(c!) run, Tensor(d!) looking, Tensor(e!)? credit=None) -> ()",
    reference=reference.thompson_look,
    cpu=thompson_look_cpu,
    cuda=thompson_look_cuda,
    cuda_is="CUDA",
    fake=lambda *_, **__: None,
)


def thompson_look(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    costs: Tensor,
    exit_cost: float,
    seed: Tensor,
    position: Tensor,
    step: int,
    top_prob: Tensor,
    length: Tensor,
    bucket: Tensor,
    run: Tensor,
    looking: Tensor,
    credit: Tensor | None = None,
) -> None:
    """Decide one draft step of every row.

    Args:
        alpha, beta: `[B, buckets]` float32, a posterior for each bucket of the top probability,
            equal parts of [0, 1]. Their sum over the buckets is the marginal posterior, so a
            prior is split over them.
        cap: `[B]` int32, longest draft allowed; -1 takes a sequence out of the round.
        costs: `[K+1]` float32 above 0, cost of a round of draft length 0 to K, in any unit.
        exit_cost: of one exit step, in the same unit.
        seed: `[B]` int64. position: `[B]` int32, cached tokens when the round begins.
        step: 0 to K.
        top_prob: `[B]` float32, the exit's largest probability for token `step`; not read by
            step 0. NaN ends a row's draft.
        length: `[B]` int32, written: tokens in the draft so far.
        bucket: `[B, K]` int32, written: the bucket of each, -1 past them.
        run: `[B, 3]` float32, written: the chance that all are accepted, the tokens expected of
            the round, and theta.
        looking: `[B]` int32, written: 1 where the next exit step is wanted.
        credit: `[B]` float32, written: plain steps (rounds of length 0) that a sequence may still
            lose; None: no bound. Each pays for its own looks and tokens, before they are made.
            A credit that is not finite drafts nothing.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("thompson_look")
    check.tensor("alpha", alpha, ("B", "buckets"), torch.float32)
    check.tensor("beta", beta, ("B", "buckets"), torch.float32)
    check.tensor("cap", cap, ("B",), torch.int32)
    check.tensor("costs", costs, ("K+1",), torch.float32)
    check.tensor("seed", seed, ("B",), torch.int64)
    check.tensor("position", position, ("B",), torch.int32)
    check.tensor("top_prob", top_prob, ("B",), torch.float32)
    check.tensor("length", length, ("B",), torch.int32)
    check.size("K+1", 1)
    check.size("buckets", 1)
    check.tensor("bucket", bucket, ("B", costs.shape[0] - 1), torch.int32)
    check.tensor("run", run, ("B", 3), torch.float32)
    check.tensor("looking", looking, ("B",), torch.int32)
    if credit is not None:
        check.tensor("credit", credit, ("B",), torch.float32)
    check.number("exit_cost", exit_cost, 0.0, float("inf"))
    check.integer("step", step, 0, costs.shape[0] - 1)
    thompson_look_op(
        alpha, beta, cap, costs, float(exit_cost), seed, position, step, top_prob, length, bucket,
        run, looking, credit,
    )  # fmt: skip
