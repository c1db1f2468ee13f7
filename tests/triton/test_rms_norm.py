"""rms_norm's kernel against its reference; rows alone and among others; graphs and `out=`."""

import pytest
import torch

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton import rms_norm as kernels
from eesd_kernels.triton.rms_norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding to the output's dtype; the interpreter truncates where it stores bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HIDDEN = {"llama-2-7b": 4096, "llama-2-13b": 5120, "llama-2-70b": 8192}


def close(got: torch.Tensor | None, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got is not None
    assert got.dtype is dtype
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 1), (3, 33), (5, 1025)])
def test_equals_the_reference(
    rows: int, size: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    x = (3 * torch.randn(rows, size, device=DEVICE)).to(dtype)
    weight = (torch.rand(size, device=DEVICE) + 0.5).to(weight_dtype)
    out = torch.empty(rows, size, dtype=dtype, device=DEVICE)
    got = rms_norm(x, weight, 1e-5, out=(out,))
    assert got is out
    close(got, reference.rms_norm(x.double(), weight.double(), 1e-5), dtype)


def test_a_row_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    x, weight = torch.randn(3, 150, device=DEVICE), torch.rand(150, device=DEVICE)
    close(rms_norm(x, weight, 0.1), reference.rms_norm(x.double(), weight.double(), 0.1), x.dtype)


def test_strided_and_more_dimensions() -> None:
    wide, weight = torch.randn(6, 80, device=DEVICE), torch.rand(40, device=DEVICE)
    for x in (wide[:, 20:60], wide[:, ::2], wide[::2, :40], wide.view(2, 3, 80)[..., :40]):
        want = rms_norm(x.contiguous(), weight, 1e-5)
        got = rms_norm(x, weight, 1e-5)
        assert got is not None
        assert want is not None
        assert got.shape == x.shape
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_have_the_same_bits_alone_and_bad_rows_do_not_spread(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 77, device=DEVICE).to(dtype), torch.rand(77, device=DEVICE)
    together = rms_norm(x, weight, 1e-5)
    assert together is not None
    for r in (0, 3, 4):
        assert torch.equal(rms_norm(x[r : r + 1], weight, 1e-5), together[r : r + 1])
    x[2, 5] = torch.nan
    spoilt = rms_norm(x, weight, 1e-5)
    assert spoilt is not None
    assert spoilt[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(spoilt[keep], together[keep])


def test_leaves_float64_to_the_reference() -> None:
    x, weight = torch.randn(2, 4, device=DEVICE), torch.rand(4, device=DEVICE)
    assert rms_norm(x.double(), weight, 1e-5) is None
    assert rms_norm(x, weight.double(), 1e-5) is None


def test_out_of_the_public_function() -> None:
    x, weight = torch.randn(3, 33, device=DEVICE), torch.rand(33, device=DEVICE)
    want = ek.rms_norm(x, weight, eps=1e-3)
    out = torch.empty_like(x)
    assert ek.rms_norm(x, weight, eps=1e-3, out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(ek.rms_norm(x, weight, eps=1e-3, out=x), want)
    with pytest.raises(ValueError, match=r"rms_norm: out: expected shape \[R, H\]"):
        ek.rms_norm(x, weight, out=out[:, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("size", HIDDEN.values(), ids=HIDDEN)
def test_real_sizes(size: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(200, size, device=DEVICE).to(torch.bfloat16)
    weight = (torch.rand(size, device=DEVICE) + 0.5).to(torch.bfloat16)
    together = ek.rms_norm(x, weight)
    close(together, reference.rms_norm(x.double(), weight.double(), 1e-5), x.dtype)
    order = torch.randperm(200, device=DEVICE)
    assert torch.equal(ek.rms_norm(x[order], weight), together[order])
    for rows in (1, 7, 64):
        assert torch.equal(ek.rms_norm(x[100 : 100 + rows], weight), together[100 : 100 + rows])
    out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.rms_norm(x, weight, out=out)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(out, together.flip(0))
