"""The decode product: values against float64, and a row's bits against everything around it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eesd_kernels import _C

# float32 sums of up to 5,120 products: the error grows like sqrt(n) eps of the terms' size.
RELATIVE = 2e-6
DTYPES = [torch.bfloat16, torch.float32]
SIZES = [(192, 576), (528, 192), (1, 1), (7, 5), (31, 9), (33, 4), (64, 1), (517, 193), (5120, 66)]
ISAS = ["generic", "avx2", "avx512"]


@pytest.fixture(autouse=True)
def _threads():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


def linear(x, weight, residual=None, out=None):
    out = torch.full((x.shape[0], weight.shape[0]), float("nan")) if out is None else out
    _C.linear(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        bf16=weight.dtype is torch.bfloat16,
        residual=0 if residual is None else residual.data_ptr(),
        x_stride=x.stride(0) if x.shape[0] > 1 else 0,
        out_stride=out.stride(0) if x.shape[0] > 1 else 0,
        residual_stride=0 if residual is None else residual.stride(0),
    )
    return out


def make(rows, features, outs, dtype):
    g = torch.Generator().manual_seed(rows + 7 * features + 31 * outs)
    x = torch.randn(rows, features, generator=g)
    return x, torch.randn(outs, features, generator=g).to(dtype)


def assert_near(got, x, weight, residual=None):
    x, weight = x.double(), weight.double()
    want = x @ weight.T + (0 if residual is None else residual.double())
    size = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None] + want.abs()
    assert ((got.double() - want).abs() <= RELATIVE * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "outs"), SIZES)
def test_value_and_row_invariance(features, outs, dtype):
    x, weight = make(37, features, outs, dtype)
    together = linear(x, weight)
    assert_near(together, x, weight)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 20):
        for first in (0, 37 - count):
            assert torch.equal(
                linear(x[first : first + count], weight), together[first : first + count]
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(dtype):
    x, weight = make(5, 192, 4096, dtype)
    _C.set_num_threads(1)
    alone = linear(x, weight)
    for count in (2, 3, 8):
        _C.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(linear(x, weight), alone)


def test_callers_in_parallel():
    _C.set_num_threads(2)
    cases = [make(rows, 192, 1500, torch.bfloat16) for rows in (1, 2, 5, 8)]
    wants = [linear(*case) for case in cases]

    def work(i):
        return all(torch.equal(linear(*cases[i]), wants[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_strides(dtype):
    x, weight = make(6, 100, 30, dtype)
    wide, plain = torch.randn(6, 160), linear(x, weight)
    wide[:, 20:120] = x
    frame = torch.full((6, 50), -5.0)
    residual = torch.randn(6, 64)[:, 3:33]
    got = linear(wide[:, 20:120], weight, residual, out=frame[:, 10:40])
    assert torch.equal(got, plain + residual)
    assert (frame[:, :10] == -5).all()
    assert (frame[:, 40:] == -5).all()
    accumulated = residual.contiguous()
    linear(x, weight, accumulated, out=accumulated)
    assert torch.equal(accumulated, got)


def test_bad_values_stay_in_their_row_and_column():
    x, weight = make(9, 70, 40, torch.bfloat16)
    clean = linear(x, weight)
    x[4, 69], weight[7, 3] = float("nan"), float("inf")
    got = linear(x, weight)
    assert got[4].isnan().all()
    rows, columns = torch.arange(9) != 4, torch.arange(40) != 7
    assert torch.equal(got[rows][:, columns], clean[rows][:, columns])
    assert not got[rows][:, 7].isfinite().any()


def test_reads_and_writes_nothing_beyond_the_ends():
    for features in range(1, 70):
        x, weight = make(3, features, 5, torch.bfloat16)
        padded = torch.full((5 * features + 64,), float("nan"), dtype=torch.bfloat16)
        padded[: 5 * features] = weight.flatten()
        frame = torch.full((3 * 5 + 16,), -5.0)
        got = linear(x, padded[: 5 * features].view(5, features), out=frame[:15].view(3, 5))
        assert torch.equal(got, linear(x, weight))
        assert (frame[15:] == -5).all()


def test_empty():
    assert linear(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert linear(torch.ones(2, 4), torch.ones(0, 4)).shape == (2, 0)
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))


def test_refusals():
    x, weight = make(2, 8, 3, torch.float32)
    with pytest.raises(ValueError, match="linear: a row stride is smaller than the row"):
        _C.linear(x.data_ptr(), weight.data_ptr(), x.data_ptr(), 2, 8, 3, bf16=False, x_stride=7)
    with pytest.raises(ValueError, match="linear: a required pointer is null"):
        _C.linear(x.data_ptr(), 0, x.data_ptr(), 2, 8, 3, bf16=False)
    with pytest.raises(ValueError, match="linear: a size is negative"):
        _C.linear(x.data_ptr(), weight.data_ptr(), x.data_ptr(), 2, -8, 3, bf16=False)
    with pytest.raises(ValueError, match="set_num_threads: expected at least 1, got 0"):
        _C.set_num_threads(0)


ROOT = Path(__file__).resolve().parents[2]
# The root goes last, so that an installed package is not shadowed by the source folder.
CHILD = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from eesd_kernels import _C
from tests.csrc.test_linear_cpu import *
for dtype in DTYPES:
    for features, outs in SIZES:
        x, weight = make(11, features, outs, dtype)
        got = linear(x, weight)
        assert_near(got, x, weight)
        for first in range(11):
            assert torch.equal(linear(x[first:], weight), got[first:])
_C.set_num_threads(2)
x, weight = make(4, 192, 4096, torch.bfloat16)
want = linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(linear(x, weight), want) else 1)
assert os.waitpid(child, 0)[1] == 0
print(_C.isa())
"""


@pytest.mark.parametrize("isa", ISAS[:2])
def test_every_instruction_set_and_a_forked_child(isa, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        env={**os.environ, "EESD_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert ISAS.index(run.stdout.strip()) <= ISAS.index(isa)
