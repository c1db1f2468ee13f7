"""Candidates sorted and summed with results that no layout and no order of threads can change.

A key is a logit and its id in one unsigned 64-bit number: the float's bits in an order-preserving
form above the id's complement. The greater key is the better candidate, ties go to the lower id,
and one comparison, one maximum or one sort settles both. 0 is below every key.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(float(1 << 40))


@triton.jit
def zero_unless_finite(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def ordered(x):
    """An int32 that grows with the float32; -0 as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(order):
    """The float32 that `ordered` made this int32 of."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def keyed(order, ids):
    """The key of a logit in the form of `ordered`, and an id at least 0."""
    high, low = (order ^ -0x80000000).to(tl.uint32, bitcast=True), ids.to(tl.uint32) ^ 0xFFFFFFFF
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def pack(x, ids):
    """x float32, ids int32 at least 0. NaN counts as +inf, -0 as 0."""
    return keyed(ordered(tl.where(x == x, x, float("inf"))), ids)


@triton.jit
def order_of(key):
    """What `ordered` gives for its logit; -2^31 for 0."""
    return (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True) ^ -0x80000000


@triton.jit
def value_of(key):
    """The float32; NaN for 0."""
    high = (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    return (high ^ tl.where(high < 0, -0x80000000, -1)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(key):
    """The id, int32; -1 for 0."""
    return (key & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True) ^ -1


@triton.jit
def _exchange(x, bit: tl.constexpr, run: tl.constexpr):
    """Order keys whose places differ in one bit; runs of 2^run places alternate, 0: all descend."""
    HALF: tl.constexpr = 1 << bit
    PAIRS: tl.constexpr = x.numel // (2 * HALF)
    pairs = x.reshape([PAIRS, 2, HALF])
    other = tl.sum(pairs, 1, keep_dims=True) - pairs  # integers wrap: exact
    greater = (tl.arange(0, 2) == 0)[None, :, None]
    if run:
        greater = greater != ((tl.arange(0, PAIRS) >> (run - bit - 1)) % 2 == 1)[:, None, None]
    return tl.where((pairs > other) == greater, pairs, other).reshape(x.shape)


@triton.jit
def merge_keys(x, LOG: tl.constexpr, run: tl.constexpr = 0):
    """Sort runs of 2^LOG places that rise and then fall, or fall and then rise."""
    for i in tl.static_range(LOG):
        x = _exchange(x, LOG - 1 - i, run)
    return x


@triton.jit
def best_keys(x, LOG: tl.constexpr, LOG_K: tl.constexpr):
    """The 2^LOG_K greatest of each 2^LOG consecutive keys, descending; x and result `[.., ]` flat.

    Batcher's bitonic sort of runs of 2^LOG_K, then halving: of two sorted runs, one turned around,
    the elementwise maximum holds the best.
    """
    for i in tl.static_range(1, LOG_K + 1):
        x = merge_keys(x, i, i if i < LOG else 0)
    for i in tl.static_range(LOG_K + 1, LOG + 1):
        x = tl.max(x.reshape([x.numel >> (LOG_K + 1), 2, 1 << LOG_K]), 1).reshape([x.numel // 2])
        x = merge_keys(x, LOG_K, LOG_K if i < LOG else 0)
    return x


@triton.jit
def sum_of_parts(x, axis: tl.constexpr):
    """The sum of numbers in [0, 1], in units of 2^-40; at most 2^22 of them. NaN counts as 1."""
    whole = (tl.minimum(x, 1.0) * UNIT).to(tl.int64)
    return tl.sum(whole, axis).to(tl.float32) * (1.0 / UNIT)
