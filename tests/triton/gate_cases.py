"""Calls of every Triton op on meta tensors of real models' shapes: `{op: {case: call}}`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eesd_kernels.triton.swiglu import swiglu

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _swiglu() -> dict[str, Callable[[], object]]:
    return {str(t): partial(swiglu, meta(6, 27_648, dtype=t)) for t in FLOATS}


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "swiglu": _swiglu(),
}
