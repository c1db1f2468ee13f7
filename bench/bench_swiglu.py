"""SwiGLU over a fused gate-up product beside PyTorch's own ops, from a decoding step to prefill.

Sizes of LLaMA-2 7B, 13B, 70B and Llama-3 8B, bf16 and fp16. Few rows stay within the L2, as in a
decoder, which has it fused into `linear`.
"""

import torch
from torch import Tensor

from bench import row_ops
from bench.harness import arguments
from eesd_kernels import reference, swiglu

CASES = [{"I": size} for size in (11_008, 13_824, 14_336, 28_672)]


def inputs(rows: int, dtype: torch.dtype, I: int) -> tuple[Tensor, ...]:  # noqa: E741, the paper's
    """Gates and ups side by side."""
    return (torch.empty(rows, 2 * I, dtype=dtype, device="cuda").normal_(),)


def composed(gate_up: Tensor) -> Tensor:
    """Two ops."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def main() -> None:
    """Measure, print and write `swiglu.json`."""
    args = arguments(__doc__.splitlines()[0])
    row_ops.main("swiglu", CASES, inputs, swiglu, reference.swiglu, composed, args)


if __name__ == "__main__":
    main()
