"""Device functions over one split of a row of logits, and over a row's splits: see `rows.py`."""

import triton
import triton.language as tl

from eesd_kernels.triton.keys import ordered, unordered
from eesd_kernels.triton.random import race_noise, words_of_tile

NO_ID = tl.constexpr(2**31 - 1)
DETERMINISTIC, COUPLED = tl.constexpr(1), tl.constexpr(2)
TARGET = tl.constexpr(2)  # the purpose of the race's noise
EACH = tl.constexpr(16)  # ids of a split in a thread: 32 and 64 were slower nearly everywhere


@triton.jit
def from_l2(ptr):
    """A load for before `gdc_wait`, of what older kernels wrote: it may not meet a stale L1."""
    return tl.load(ptr, cache_modifier=".cg")


@triton.jit
def some_from_l2(ptr, mask, other):
    """The same with a mask."""
    return tl.load(ptr, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def exponent(temperature):
    """c of `exp2(x * c) = exp(x / T)`; a greedy row is summed as if its temperature were 1."""
    t = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(1.4426950408889634 / t, 3e38)


@triton.jit
def finite_or_zero(top):
    """A largest logit to subtract: 0 where it is -inf, so that no difference is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def depth_of(parent_ptr, row):
    """Steps from the root of the parents `[R]`."""
    depth, node = 0, row
    while node > 0:
        up = tl.load(parent_ptr + node)
        node = tl.where(up < node, up, 0)
        depth += 1
    return depth


@triton.jit
def ids_of(first, BLOCK: tl.constexpr):
    """The ids `[BLOCK / 4, 4]` of the split at `first`: its tile."""
    return first + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def raw_split(row_ptr, first, vocab, BLOCK: tl.constexpr):
    """The logits of the split at `first`, a tile, as they are stored; -inf beyond the row."""
    ids = ids_of(first, BLOCK)
    return tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def load_split(row_ptr, cutoff, first, vocab, BLOCK: tl.constexpr):
    """ids and logits `[BLOCK]` of the split at `first`, float32; -inf below the cutoff."""
    ids = first + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return ids, tl.where(x < cutoff, float("-inf"), x)  # NaN stays


@triton.jit
def lowered(x, c):
    """The largest of a tile of logits, and how far each lies below: `p` goes as `exp2` of it."""
    THREADS: tl.constexpr = x.numel // EACH if x.numel > EACH else 1
    shape: tl.constexpr = [x.numel // (4 * THREADS), THREADS, 4]
    each = tl.max(tl.max(x.reshape(shape), 2), 0)
    top = unordered(tl.max(ordered(each), 0))
    return top, (x - finite_or_zero(top)) * c


@triton.jit
def sum_of(x):
    """A tile's."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def first_of(chosen, first, BLOCK: tl.constexpr):
    """The lowest chosen id of the split at `first`; NO_ID if none."""
    return tl.min(tl.min(tl.where(chosen, ids_of(first, BLOCK), NO_ID), 1), 0)


@triton.jit
def without(below, first, listed, BLOCK: tl.constexpr):
    """`lowered`'s tile, -inf at the listed ids.

    Of the tile that was loaded: a branch keeps its layout, and would give noise one of its own.
    """
    left = tl.where((listed >= first) & (listed < first + BLOCK), listed, NO_ID)
    out = tl.min(left, 0)
    while out < NO_ID:  # seldom more than one
        below = tl.where(ids_of(first, BLOCK) == out, float("-inf"), below)
        left = tl.where(left == out, NO_ID, left)
        out = tl.min(left, 0)
    return below


@triton.jit
def children_of(row, token_ptr, parent_ptr, count, COUNT: tl.constexpr):
    """The nodes' tokens `[count]` of which `row` is the parent; -1 for the others."""
    at = tl.arange(0, COUNT)
    token = tl.load(token_ptr + at, mask=at < count, other=-1)
    return tl.where(tl.load(parent_ptr + at, mask=at < count, other=-2) == row, token, -1)


@triton.jit
def _sooner(a, word_a, lift_a, id_a, b, word_b, lift_b, id_b):
    """The smaller of two bounds, and what belongs to it."""
    take = a <= b
    word, lift = tl.where(take, word_a, word_b), tl.where(take, lift_a, lift_b)
    return tl.where(take, a, b), word, lift, tl.where(take, id_a, id_b)


@triton.jit
def race_split(below, first, position, base, seed, BLOCK: tl.constexpr):
    """key and id of a split's winner; `below` as `lowered` gives it.

    `-log1p(-u) > u`: an id whose `u / mass` is above the best key has lost, without its logarithm.
    So a thread takes the logarithm of one of its ids, the first by that bound. Where others might
    still win, in few splits, it takes all.
    """
    THREADS: tl.constexpr = BLOCK // EACH if BLOCK > EACH else 1
    words = words_of_tile(first, position, base, TARGET, seed, BLOCK)
    lift = tl.exp2(below * -1.0)  # `-x` is `0 - x` here, an instruction more
    # The bound times 2^32, as integers: these are as quick to compare, and NaN (0 inf) is last.
    bound = (words.to(tl.float32) * lift).to(tl.int32, bitcast=True)
    shape: tl.constexpr = [BLOCK // (4 * THREADS), THREADS, 4]
    mine = (bound.reshape(shape), words.reshape(shape), lift.reshape(shape),
            ids_of(first, BLOCK).reshape(shape))  # fmt: skip
    bounds, word, its_lift, ids = tl.reduce(tl.reduce(mine, 2, _sooner), 0, _sooner)
    key, who = winner(race_noise(word) * its_lift, ids, 0)
    # Rounding may lift a bound over its key, by less than 2^-20 of it.
    bar = (key * ((1 << 32) + (1 << 12))).to(tl.int32, bitcast=True)
    rivals = tl.sum(tl.sum((mine[0] <= bar).to(tl.int32), 2), 0) - (bounds <= bar).to(tl.int32)
    rivals = tl.sum(rivals, 0)
    if rivals > 0:
        # The words are worked out anew, for which no register is kept: the quotient is 0.
        first += rivals // (4 * BLOCK) * 4
        words = words_of_tile(first, position, base, TARGET, seed, BLOCK)
        keys = race_noise(words) * lift
        key = tl.min(tl.min(keys, 1), 0)
        who = first_of(keys == key, first, BLOCK)
    return key, who


@triton.jit
def winner(keys, ids, axis: tl.constexpr):
    """The smallest key along an axis, of keys at least 0, and its id, the lowest of equals."""
    bits = keys.to(tl.int32, bitcast=True)  # which a warp compares in one step
    least = tl.min(bits, axis)
    id = tl.min(tl.where(bits == tl.expand_dims(least, axis), ids, NO_ID), axis)
    return least.to(tl.float32, bitcast=True), id


@triton.jit
def merge(tops, sums, c, axis: tl.constexpr):
    """top and normaliser `sum exp((x - top) / T)` of rows from their splits along an axis.

    A bad row (NaN, +inf, no finite logit) has a normaliser that is NaN or 0: ask `not > 0`.
    """
    top = tl.max(tops, axis)
    weight = tl.exp2((tops - tl.expand_dims(finite_or_zero(top), axis)) * c)
    # A split without logits weighs nothing; one with +inf has a NaN sum.
    return top, tl.sum(tl.where(tops == float("-inf"), sums * 0.0, sums * weight), axis)


@triton.jit
def lifted(key, top, row_top, c):
    """A split's key in units of the row's top."""
    lift = tl.exp2((finite_or_zero(row_top) - finite_or_zero(top)) * c)
    return tl.where(key == float("inf"), key, key * lift)  # nobody there: inf * 0 would be NaN


@triton.jit
def merge_races(keys, tops, ids, top, c, axis: tl.constexpr):
    """The winner of rows from their splits' winners; `top` as `merge` gives it."""
    return winner(lifted(keys, tops, tl.expand_dims(top, axis), c), ids, axis)


@triton.jit
def pick(key, token, scale, inside_key, inside_id, rest_id):
    """The race's token: the winner outside, its p weighed by scale, against the one inside."""
    key = key / scale
    inside = (inside_key < key) | ((inside_key == key) & (inside_id < token))
    token = tl.where(inside, inside_id, token)
    nobody = tl.minimum(key, inside_key) == float("inf")
    return tl.where(nobody, rest_id, token)


@triton.jit
def mass_of(x, top, c):
    """A logit's probability times the row's normaliser, `exp((x - top) / T)`, float64."""
    return tl.exp2((x - finite_or_zero(top)) * c).to(tl.float64)


@triton.jit
def key_of(word, mass):
    """The race's key of a mass in those units, +inf where there is none."""
    mass = mass.to(tl.float32)
    return tl.where(mass > 0, race_noise(word) / mass, float("inf"))
