"""Batched Beta(alpha, beta) draws keyed by (seed, position, bucket): Marsaglia and Tsang 2000.

alpha, beta `[B]` or `[B, buckets]`, any value above 0, below 1 too; float32 draws that lie
strictly inside (0, 1). Bound by arithmetic: about two Philox calls and four logarithms a draw.
CPU and CUDA give the same bits. Bad parameters (0, negative, NaN, infinite) give NaN in their own
element and nowhere else.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import Checks
from eesd_kernels._cpu import sample_beta_cpu
from eesd_kernels._cuda import sample_beta_cuda
from eesd_kernels._library import register

sample_beta_op = register(
    "sample_beta(Tensor alpha, Tensor beta, Tensor seed, Tensor position) -> Tensor",
    reference=reference.sample_beta,
    cpu=sample_beta_cpu,
    cuda=sample_beta_cuda,
    cuda_is="CUDA",
    fake=lambda alpha, beta, seed, position: alpha.new_empty(alpha.shape),
)


def sample_beta(alpha: Tensor, beta: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw one Beta variate an element.

    Args:
        alpha, beta: `[B]` or `[B, buckets]` float32, above 0.
        seed: `[B]` int64. position: `[B]` int32. The bucket's index is the Philox index.

    Returns:
        float32, the shape of alpha, inside (0, 1).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device, or on the CPU a
        parameter that is not positive and finite.
    """
    check = Checks("sample_beta")
    shape = ("B", "buckets")[: max(1, min(2, alpha.dim() if isinstance(alpha, Tensor) else 1))]
    check.tensor("alpha", alpha, shape, torch.float32)
    check.tensor("beta", beta, shape, torch.float32)
    check.tensor("seed", seed, ("B",), torch.int64)
    check.tensor("position", position, ("B",), torch.int32)
    out = sample_beta_op(alpha, beta, seed, position)
    if alpha.device.type == "cpu" and bool(out.isnan().any()):
        for name, value in (("alpha", alpha), ("beta", beta)):
            bad = ~((value > 0) & value.isfinite())
            if bool(bad.any()):
                raise ValueError(
                    f"sample_beta: {name}: expected finite values above 0, "
                    f"got {value[bad][0].item()}"
                )
    return out
