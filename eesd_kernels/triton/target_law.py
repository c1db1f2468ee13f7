"""Where the target's law ends: the least logit of each row that top-k, top-p and min-p keep.

`reference/target_law.py` by one number a row: an id is kept iff its logit is at or above it, so
equals stand or fall together, and whoever reads the row again filters it by one comparison.

top-k and top-p are one search: the greatest value at or above which the ids, or their mass, reach a
target. Values are counted as *steps*, integers in their order. A sample of the row says which
steps likely enclose the answer; one pass over the row sums what lies above them and counts what
lies between in 1,024 bins. bfloat16 mostly ends there; else the bin is the next bracket, and where
the sample misled, the side that was missed. min-p needs the maximum alone. Nothing is sorted. One
program a row: the maximum, the mass, then a pass or three, `2 V` or `4 V` bytes each, out of the
L2 after the first; exponentials and comparisons bound it.

Counts are integers, masses within the bracket 2^-40 of the largest probability, others float32
sums in an order fixed by V: the bits are the row's own. Masses closer than 1e-6 of the whole may
compare otherwise than in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.rows import exponent

BINS = 1024
FEW = 8192  # so many ids go into the bins without a guess
SAMPLE = 4096
CHUNK = 64  # neighbours in the sample: 128 bytes of bfloat16
LANES, PER, WIDE = 512, 8, 32  # a tile: a column a thread; wide where registers allow
WARPS = 16
# Low bits of float32 that all values of a dtype share.
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
ONE = tl.constexpr(float(1 << 40))  # the largest probability in the bins


@triton.jit
def _step_of(x, SHIFT: tl.constexpr):
    """Floats to int32 in the same order; those of one dtype are neighbours."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value_of(step, SHIFT: tl.constexpr):
    """The float32 of a step."""
    bits = (step << SHIFT) | tl.where(step < 0, (1 << SHIFT) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, first, at, V):
    """Logits `first + at` as float32; what is beyond the row or NaN is -inf."""
    x = tl.load(row_ptr + first + at, mask=at < V - first, other=float("-inf"))
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _peak(row_ptr, V, LANES: tl.constexpr, PER: tl.constexpr):
    at = tl.arange(0, PER)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full([LANES], float("-inf"), tl.float32)
    for first in range(0, V, LANES * PER):
        top = tl.maximum(top, tl.max(_load(row_ptr, first, at, V), 0))
    return tl.max(top, 0)


@triton.jit
def _mass(row_ptr, V, peak, c, LANES: tl.constexpr, PER: tl.constexpr):
    """`sum exp((x - peak) / T)`."""
    at = tl.arange(0, PER)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    mass = tl.full([LANES], 0.0, tl.float32)
    for first in range(0, V, LANES * PER):
        mass += tl.sum(tl.exp2((_load(row_ptr, first, at, V) - peak) * c), 0)
    return tl.sum(mass, 0)


@triton.jit
def _guess(
    row_ptr, V, least, most, by_mass, target, mass, peak, c,
    SHIFT: tl.constexpr, SAMPLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Two steps in [least, most] that likely enclose the answer, from a sample of the row.

    Ids are counted from above, mass from below: the few ids that bear most of it are rarely met.
    """
    at = tl.arange(0, SAMPLE)
    x = _load(row_ptr, 0, at // CHUNK * (V // (SAMPLE // CHUNK)) + at % CHUNK, V)
    w = tl.where(by_mass, tl.exp2((x - peak) * c), 1.0)
    w = tl.where(x >= _value_of(least, SHIFT), w, 0.0)
    whole = tl.sum(w, 0)
    rank = tl.where(by_mass, mass - target, target) * (SAMPLE / V)
    side = tl.arange(0, 2)  # below the answer, above it
    low = tl.full([2], 0, tl.int64) + least
    high = tl.full([2], 0, tl.int64) + most
    for _ in range(32 - max(SHIFT, 10)):
        mid = (low + high) >> 1
        value = _value_of(mid.to(tl.int32), SHIFT)
        above = tl.sum(tl.where(x[None, :] >= value[:, None], w[None, :], 0.0), 1)
        # Four standard deviations, of a count or of a sum of weights that are the value's at most.
        each = tl.where(by_mass, tl.exp2(tl.minimum(value - peak, 0.0) * c), 1.0)
        slack = 4.0 * (tl.sqrt(rank * each) + each)
        slack = tl.where(side == 0, slack, -slack)
        under = tl.where(by_mass, whole - above + slack <= rank, above >= rank + slack)
        low, high = tl.where(under, mid, low), tl.where(under, high, mid)
    low, high = tl.sum(tl.where(side == 0, low, 0), 0), tl.sum(tl.where(side == 1, high, 0), 0)
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _fill(
    row_ptr, numbers_ptr, masses_ptr, V, low, high, shift, by_mass, peak, c,
    SHIFT: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """One pass: ids and mass at or above `high`, and of each bin of 2^shift steps from `low` on."""
    bins = tl.arange(0, BINS)
    tl.store(numbers_ptr + bins, tl.full([BINS], 0, tl.int32))
    tl.store(masses_ptr + bins, tl.full([BINS], 0, tl.int64))
    tl.debug_barrier()
    above = tl.full([LANES], 0, tl.int32)
    mass = tl.full([LANES], 0.0, tl.float32)
    at = tl.arange(0, PER)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x = _load(row_ptr, 0, at, V)
    for first in range(0, V, LANES * PER):
        later = _load(row_ptr, first + LANES * PER, at, V)  # on its way while x is looked at
        w = tl.exp2((x - peak) * c)
        step = _step_of(x, SHIFT)
        above += tl.sum((step >= high).to(tl.int32), 0)
        mass += tl.sum(tl.where(step >= high, w, 0.0), 0)
        inside = (step >= low) & (step < high) & (at < V - first)
        bin = (step - low).to(tl.uint32, bitcast=True) >> shift
        tl.atomic_add(numbers_ptr + bin, 1, mask=inside, sem="relaxed")
        if by_mass & (shift > 0):
            fixed = (w * ONE).to(tl.int64)
            tl.atomic_add(masses_ptr + bin, fixed, mask=inside, sem="relaxed")
        x = later
    tl.debug_barrier()
    number = tl.load(numbers_ptr + bins, cache_modifier=".cg")
    masses = tl.load(masses_ptr + bins, cache_modifier=".cg")
    # A bin of one value: the last one of the bracket's may be no number.
    w = tl.exp2(tl.minimum(_value_of(low + bins, SHIFT) - peak, 0.0) * c)
    alone = tl.where(number > 0, number.to(tl.float32) * w * ONE, 0.0).to(tl.int64)
    return tl.sum(above, 0), tl.sum(mass, 0), number, tl.where(shift == 0, alone, masses)


@triton.jit
def _search(
    row_ptr, numbers_ptr, masses_ptr, V, least, most, count, mass, by_mass, target, peak, c,
    SHIFT: tl.constexpr, BINS: tl.constexpr, FEW: tl.constexpr, SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """The greatest step in [least, most) from which on ids or mass reach the target, and both.

    `count` ids and `mass` are those from `least` on, and `most` lies above all.
    """
    bins = tl.arange(0, BINS)
    low, high = least, most
    if count > FEW:
        low, high = _guess(
            row_ptr, V, least, most, by_mass, target, mass, peak, c, SHIFT, SAMPLE, CHUNK
        )
        low = tl.minimum(tl.maximum(low, least), most - 1)
        high = tl.minimum(tl.maximum(high, low + 1), most)
    while most.to(tl.int64) - least > 1:
        width, shift = high.to(tl.int64) - low, tl.zeros([], tl.int32)
        while (width - 1) >> shift >= BINS:
            shift += 1
        above, mass_above, number, masses = _fill(
            row_ptr, numbers_ptr, masses_ptr, V, low, high, shift, by_mass, peak, c,
            SHIFT, BINS, LANES, PER,
        )  # fmt: skip
        amounts = tl.where(by_mass, masses, number.to(tl.int64))
        need = tl.where(
            by_mass, ((target - mass_above) * ONE).to(tl.int64), target.to(tl.int64) - above
        )
        reached = tl.sum((tl.cumsum(amounts, 0, reverse=True) >= need).to(tl.int32), 0)
        # At the ends of the bracket the answer is known, whatever rounding says.
        if (need <= 0) & (high < most):
            least, count, mass = high, above, mass_above
        elif (reached == 0) & (low > least):
            most = low
        else:
            found = tl.minimum(tl.maximum(reached - 1, 0), ((width - 1) >> shift).to(tl.int32))
            most = tl.minimum(low.to(tl.int64) + ((found.to(tl.int64) + 1) << shift), high)
            most = most.to(tl.int32)
            least = low + (found << shift)
            count = above + tl.sum(tl.where(bins >= found, number, 0), 0)
            mass = mass_above + tl.sum(tl.where(bins >= found, masses, 0), 0) / ONE
        low, high = least, most
    return least, count, mass


@triton.jit
def _least_of_min_p(peak, temperature, min_p):
    """The least float32 x with `exp((x - peak) / T) >= min_p`."""
    exact = peak.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
    near = exact.to(tl.float32)
    return tl.where(near.to(tl.float64) < exact, _value_of(_step_of(near, 0) + 1, 0), near)


# Strides of unknown divisibility: a thread's columns then lie apart, as the atomics want them.
@triton.jit(do_not_specialize=["stride_b", "stride_r"])
def _cutoffs_kernel(
    logits_ptr, live_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, numbers_ptr,
    masses_ptr, out_ptr, V, stride_b, stride_r,
    BONUS: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr, FEW: tl.constexpr,
    SAMPLE: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, PER: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    b, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * tl.num_programs(1) + r
    tl.store(out_ptr + row, float("-inf"))
    temperature, live = tl.load(temperature_ptr + b), tl.maximum(tl.load(live_ptr + b), 0) + BONUS
    top_k = tl.load(top_k_ptr + b) if top_k_ptr is not None else tl.full([], 0, tl.int32)
    top_p = tl.load(top_p_ptr + b) if top_p_ptr is not None else tl.full([], 1.0, tl.float32)
    min_p = tl.load(min_p_ptr + b) if min_p_ptr is not None else tl.full([], 0.0, tl.float32)
    by_k, by_p = (top_k > 0) & (top_k < V), top_p < 1.0
    if (r < live) & (temperature > 0.0) & (by_k | by_p | (min_p > 0.0)):
        row_ptr = logits_ptr + b * stride_b + r * stride_r
        numbers_ptr += row * BINS
        masses_ptr += row * BINS
        peak, c = _peak(row_ptr, V, LANES, WIDE), exponent(temperature)
        if (peak > float("-inf")) & (peak < float("inf")):
            lowest = tl.full([], float("-inf"), tl.float32)
            least, most = _step_of(lowest, SHIFT), _step_of(peak, SHIFT) + 1
            count, mass = tl.full([], 0, tl.int32) + V, tl.full([], 0.0, tl.float32)
            no, yes = count < 0, count >= 0
            if by_k:
                least, count, mass = _search(
                    row_ptr, numbers_ptr, masses_ptr, V, least, most, count, mass, no, top_k, peak,
                    c, SHIFT, BINS, FEW, SAMPLE, CHUNK, LANES, PER,
                )  # fmt: skip
            elif by_p:
                mass = _mass(row_ptr, V, peak, c, LANES, WIDE)
            if by_p:
                # However little is asked for, the likeliest is kept.
                target = tl.maximum(top_p * mass, 1e-9)
                least, count, mass = _search(
                    row_ptr, numbers_ptr, masses_ptr, V, least, most, count, mass, yes, target,
                    peak, c, SHIFT, BINS, FEW, SAMPLE, CHUNK, LANES, PER,
                )  # fmt: skip
            cutoff = _value_of(least, SHIFT)
            if min_p > 0.0:
                cutoff = tl.maximum(cutoff, _least_of_min_p(peak, temperature, min_p))
            tl.store(out_ptr + row, cutoff)


def cutoffs(
    logits: Tensor,
    live: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    *,
    bonus: int = 0,
) -> Tensor:
    """The least kept logit of each row, -inf where nothing is filtered.

    Args:
        logits: `[B, R, V]` bf16, fp16 or fp32, the last dimension dense.
        live: `[B]` int32. Rows at or beyond `live + bonus` get -inf.
        temperature, top_k, top_p, min_p: `[B]` each, as in `verify_linear`.

    Returns:
        float32 `[B, R]`. Bad rows get a number of no meaning.
    """
    batch, rows, vocab = logits.shape
    live, temperature = live.contiguous(), temperature.contiguous()
    top_k, top_p, min_p = (x if x is None else x.contiguous() for x in (top_k, top_p, min_p))
    out = torch.empty(batch, rows, dtype=torch.float32, device=logits.device)
    numbers = torch.empty(batch, rows, BINS, dtype=torch.int32, device=logits.device)
    masses = torch.empty(batch, rows, BINS, dtype=torch.int64, device=logits.device)
    if out.numel():
        _cutoffs_kernel[(batch, rows)](
            logits, live, temperature, top_k, top_p, min_p, numbers, masses, out, vocab,
            logits.stride(0), logits.stride(1), BONUS=bonus, SHIFT=SHIFTS[logits.dtype], BINS=BINS,
            FEW=FEW, SAMPLE=SAMPLE, CHUNK=CHUNK, LANES=LANES, PER=PER, WIDE=WIDE, num_warps=WARPS,
        )  # fmt: skip
    return out
