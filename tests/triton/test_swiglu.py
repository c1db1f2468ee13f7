"""swiglu's kernel against its reference, in memory's dtypes; rows alone and among others."""

import pytest
import torch

from eesd_kernels import reference
from eesd_kernels.triton.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding to the output's dtype; the interpreter truncates where it stores bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 1), (3, 33), (2, 1025)])
def test_equals_the_reference(rows: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * size, device=DEVICE).to(dtype)
    out = torch.empty(rows, size, dtype=dtype, device=DEVICE)
    got = swiglu(x, out=(out,))
    assert got is out
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(got, reference.swiglu(x), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_have_the_same_bits_alone(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * 77, device=DEVICE).to(dtype)
    together = swiglu(x)
    assert together is not None
    for r in (0, 3, 4):
        assert torch.equal(swiglu(x[r : r + 1]), together[r : r + 1])


def test_leaves_float64_to_the_reference() -> None:
    assert swiglu(torch.randn(2, 4, dtype=torch.float64, device=DEVICE)) is None
