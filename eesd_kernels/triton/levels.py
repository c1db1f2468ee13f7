"""Device functions over the levels of a linear draft, vectors `[ROWS]`: for its walk."""

import triton
import triton.language as tl

BLOCK_LAW = tl.constexpr(3)


@triton.jit
def at_level(values, level, m):
    """`values[m]`, whatever stands at other levels."""
    return tl.sum(tl.where(level == m, values, 0.0), 0)


@triton.jit
def above_zero(x):
    """max(x, 0), NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def stands(growth, level, length):
    """The block rule's a_i of every level: `a_(i+1) = min(a_i growth_i, 1)` from 1 on, float64."""
    a, now = tl.where(level == 0, 1.0, 0.0).to(tl.float64), tl.full((), 1.0, tl.float64)
    for j in range(length):
        now = now * at_level(growth, level, j)
        now = tl.where(now > 1, 1.0, now)
        a = tl.where(level == j + 1, now, a)
    return a
