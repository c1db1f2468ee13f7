"""RMSNorm beside PyTorch's own, from one decoding step's rows to a chunk of prefill.

Hidden sizes of LLaMA-2 7B, 13B, 70B and Llama-3 8B, bf16 and fp16. Few rows stay within the L2, as
in a decoder, where time is a launch.
"""

import torch
from torch import Tensor

from bench import row_ops
from bench.harness import arguments
from eesd_kernels import reference, rms_norm

EPS = 1e-5
CASES = [{"H": size} for size in (4_096, 5_120, 8_192)]


def inputs(rows: int, dtype: torch.dtype, H: int) -> tuple[Tensor, ...]:
    """Rows, and a weight near 1."""
    x = torch.empty(rows, H, dtype=dtype, device="cuda").normal_()
    return x, torch.empty(H, dtype=dtype, device="cuda").normal_(1, 0.3)


def main() -> None:
    """Measure, print and write `rms_norm.json`."""
    row_ops.main(
        "rms_norm",
        CASES,
        inputs,
        lambda x, weight, **out: rms_norm(x, weight, eps=EPS, **out),
        lambda x, weight: reference.rms_norm(x, weight, EPS),
        lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, EPS),
        arguments(__doc__.splitlines()[0]),
    )


if __name__ == "__main__":
    main()
