"""RMSNorm, LM head, top-k and logsumexp in one pass over the weight, and no logits in memory.

Three launches, each set off before the end of the last (programmatic dependent launch):
- *prepare*, one program a row: the row normalised. More of them fill its records with poison.
- *scan*, one program a tile of the weight and of up to 64 rows: the loop of `linear`, and of each
  group of ids the best DEPTH logits, a bound of all others (the next best) and the sum of
  exponentials: 24 or 32 bytes for 64 logits. First over the 16 ids that a warp holds, by shuffles,
  then over the warps in two exchanges.
- *merge*, one program a row: the k best of all that is listed. A group whose bound and whole list
  are above the k-th best may hide more: its logits are computed anew, which 1 row in 5,000 needs
  (32,000 logits in random order, k = 8), and any row may. For k up to 8 one warp takes the records
  as they come, while scan still runs: what is no longer poison has been written.

Bound by reading the weight, `2 V H` bytes in bfloat16. A product's columns do not see each other,
H is summed in ascending order, exponentials are added as integers and keys compared exactly, so a
row has the same bits in any batch and any row tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.keys import best_keys, id_of, keyed, order_of, pack, unordered, value_of
from eesd_kernels.triton.launch import architecture, overlap, shared_memory
from eesd_kernels.triton.linear import product
from eesd_kernels.triton.rms_norm import norm_row, tile_of
from eesd_kernels.triton.sample_draft import draw, log2_up
from eesd_kernels.triton.splits import NO_ID, from_l2

ROW_TILES = (16, 32, 64)
IN_TURN = 3  # up to 2^this many of the best are found one after the other, more by sorting
CHUNK = 64  # groups that merge's warp reads at once to find them in turn,
MANY_GROUPS = 1024  # from here on twice as many: 128,256 x 4,096, 1 row: 233.6 us and not 237.7
MOST_SORTED = 4096  # groups at once of those that it sorts, with four warps or eight
MERGE_H = 32  # columns at once of a group that is computed anew: a warp has registers for no more
LOWEST = tl.constexpr(-(2**31))
POISON = tl.constexpr(-1)  # no word of a record: the upper half is a key's, at most that of +inf.
# Each word tells of itself alone whether it is written, in whatever order words arrive: aligned
# stores and loads of 8 bytes are whole, and volatile loads do not stop at the L1.
POISONED = tl.constexpr(2**31 - 1)  # what `order_of` gives for it: above that of +inf
ANY = tl.constexpr(2**64 - 1)  # a key above all
LANES = tl.constexpr(32)  # of a warp, which finds the greatest of one int32 a lane in one step
UNIT = tl.constexpr(float(1 << 23))  # at most 2^8 of them: a uint32 holds the sum of a group
WARP = tl.constexpr(16)  # rows of an accumulator in one warp, of mma and of wgmma


class Config(NamedTuple):
    """How a weight is read. `group` decides bits, and may follow V, H and k alone."""

    block_v: int
    block_h: int
    warps: int
    stages: int
    group: int = 64  # ids that share a list, a bound and a sum; divides block_v
    x_left: bool = False  # the operands' order; a warp then holds whole groups


HALVES = Config(64, 128, 4, 4)
MANY_ROWS = Config(64, 128, 4, 3, x_left=True)  # for a row tile of 64
"""Two programs an SM: one reads while the other lists. On an H200, merge behind scan, 32,000 x
4,096, 1 row: 68.0 us; with one program that reads as far ahead (6 stages) 70.5. 64 rows: 73.3 us;
with the weight on the left 81.6, for its groups lie across warps; at 16 rows that is the faster one
(wgmma). Tiles dealt to two programs an SM, in one loop over all their columns, were up to 3%
slower."""
SINGLES = Config(32, 32, 4, 3, 32)  # no tensor cores: float32 products are exact ones


def depth_of(log_k: int) -> int:
    """Listed logits of a group: k alone decides how often a group is computed anew."""
    return 2 if log_k <= 4 else 3


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _whole(x):
    """A number in [0, 1] in units of 2^-23: the mantissa of 1 + x, an add where a cast is slow."""
    return (tl.minimum(x, 1.0) + 1.0).to(tl.uint32, bitcast=True) - 0x3F800000


@triton.jit
def _both(high, low):
    """An int64 of the upper half of one and the lower half of another."""
    return ((high >> 32 << 32) | (low & 0xFFFFFFFF)).to(tl.int64, bitcast=True)


@triton.jit
def _prepare_kernel(
    x_ptr, norm_ptr, out_ptr, lists_ptr, stride, size, groups, eps, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row normalised by the first of its programs; if merge polls, its records are poisoned by
    the others, so that the first takes no longer for it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if part == 0:
        norm_row(x_ptr + row * stride, norm_ptr, out_ptr + row * size, size, eps, WHOLE, BLOCK)
    else:
        at = (part - 1) * BLOCK + tl.arange(0, BLOCK)
        poison = tl.full([BLOCK], POISON, tl.int64)
        tl.store(lists_ptr + row * (4 * groups) + at, poison, mask=at < 4 * groups)


@triton.jit
def _best_left(x, place, NONE: tl.constexpr):
    """The best of the ids that a warp holds, and x `[N, S, SPAN, ROWS]` without it."""
    top = tl.max(x, 2)
    first = tl.min(tl.where(x == top[:, :, None, :], place, NONE), 2)
    key = tl.where(top == top, pack(top, first), 0)
    return key, tl.where(place == first[:, :, None, :], float("nan"), x)


@triton.jit
def _most_left(x):
    """A key with the value of the best left."""
    top = tl.max(x, 2)
    return tl.where(top == top, pack(top, tl.zeros(top.shape, tl.int32)), 0)


@triton.jit
def _merge_twos(a1, a2, a3, sum_a, b1, b2, b3, sum_b):
    """Of two descending lists the head of their union: its r-th is the greatest a_r, b_r or
    min(a_i, b_j) with i + j = r."""
    c2 = tl.maximum(tl.maximum(a2, b2), tl.minimum(a1, b1))
    c3 = tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1))
    return tl.maximum(a1, b1), c2, tl.maximum(tl.maximum(a3, b3), c3), sum_a + sum_b


@triton.jit
def _merge_threes(a1, a2, a3, a4, sum_a, b1, b2, b3, b4, sum_b):
    c1, c2, c3, total = _merge_twos(a1, a2, a3, sum_a, b1, b2, b3, sum_b)
    c4 = tl.maximum(tl.minimum(a1, b3), tl.maximum(tl.minimum(a2, b2), tl.minimum(a3, b1)))
    return c1, c2, c3, tl.maximum(tl.maximum(a4, b4), c4), total


@triton.jit
def _fetch(w_ptrs, COLUMNS: tl.constexpr):
    """The first columns of rows of the weight into the L2: a hint, which reads nothing."""
    WIDTH: tl.constexpr = w_ptrs.dtype.element_ty.primitive_bitwidth // 8
    lines = tl.arange(0, COLUMNS * WIDTH // 128) * (128 // WIDTH)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l",
        [(w_ptrs + lines[None, :]).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R"])
def _scan_kernel(
    x_ptr, w_ptr, lists_ptr, R, V, H, groups, stride_x, stride_w,
    DOT: tl.constexpr, EVEN_V: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, DEPTH: tl.constexpr,
    X_LEFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a tile of the weight and of the rows."""
    tile = tl.program_id(1)
    N: tl.constexpr = BLOCK_V // GROUP
    SPAN: tl.constexpr = GROUP if X_LEFT else WARP  # ids of a group in one warp
    S: tl.constexpr = GROUP // SPAN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < R
    row = row.to(tl.int64)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = ids < V
    w_ptrs = w_ptr + ids.to(tl.int64)[:, None] * stride_w
    if PDL:
        if EVEN_V and EVEN_H:  # no row or column beyond
            _fetch(w_ptrs, BLOCK_H)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = product(
        x_ptr + row[None, :] * stride_x, w_ptrs, in_rows, in_v, H, DOT, EVEN_V, EVEN_H, BLOCK_V,
        BLOCK_H, ROWS, X_LEFT,
    )  # fmt: skip

    # x [N, S, SPAN, ROWS]; NaN: not a logit, or no longer one
    x = tl.where(acc == acc, acc, float("inf"))
    if not EVEN_V:
        x = tl.where(in_v[:, None], x, float("nan"))
    x = x.reshape([N, S, SPAN, ROWS])
    place = tl.arange(0, GROUP).reshape([1, S, SPAN, 1])
    top = tl.max(tl.max(x, 2), 1)
    e = tl.exp(x - _finite_or_zero(top)[:, None, None, :])
    if not EVEN_V:
        e = tl.where(x == x, e, 0.0)
    total = tl.sum(_whole(e), 2)
    k1, x = _best_left(x, place, GROUP)
    k2, x = _best_left(x, place, GROUP)
    if DEPTH == 2:
        k3 = _most_left(x)
        k1, k2, k3, total = tl.reduce((k1, k2, k3, total), 1, _merge_twos)
    else:
        k3, x = _best_left(x, place, GROUP)
        k4 = _most_left(x)
        k1, k2, k3, k4, total = tl.reduce((k1, k2, k3, k4, total), 1, _merge_threes)

    # Beside the place of each listed logit stands the next one: the last of all is the bound.
    l0, l1, l2 = _both(k1, total.to(tl.uint64)), _both(k2, k1), _both(k3, k2)
    l3 = l2 * 0
    if DEPTH == 3:
        l3 = _both(k4, k3)
    record = tl.join(tl.join(l0, l2), tl.join(l1, l3)).reshape([N, ROWS, 4])
    group = tile * N + tl.arange(0, N)
    live = (group < groups)[:, None] & in_rows[None, :]
    cell = (row * groups)[None, :] + group[:, None]
    ptrs = lists_ptr + 4 * cell[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(ptrs, record, mask=live[:, :, None])


@triton.jit
def _anew(
    x_ptr, w_ptr, group, V, H, stride_w, DOT: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Keys `[IDS]` of a group's logits in one row, by the same product as in the scan."""
    place, column = tl.arange(0, IDS), tl.arange(0, WARP)
    ids = group * GROUP + place
    inside = (place < GROUP) & (ids < V)
    acc = product(
        x_ptr + column[None, :] * 0, w_ptr + ids.to(tl.int64)[:, None] * stride_w, column == 0,
        inside, H, DOT, False, EVEN_H, IDS, BLOCK_H, WARP,
    )  # fmt: skip
    x = acc  # its first column; by a sum over the others the compiler fails for sm_100
    for _ in tl.static_range(4):
        x, _ = tl.split(x.reshape([IDS, x.numel // (2 * IDS), 2]))
    return tl.where(inside, pack(x.reshape([IDS]), ids), 0)


@triton.jit
def _key_in(high, low, first):
    """The key of an upper half and of a place in the group whose first id is given; 0 if none."""
    order = order_of(high.to(tl.uint64, bitcast=True))
    id = id_of(low.to(tl.uint64, bitcast=True)) + first
    return tl.where(order > LOWEST, keyed(order, id), 0)


@triton.jit
def _listed(lists_ptr, group, there, GROUP: tl.constexpr, DEPTH: tl.constexpr):
    """Of groups: all listed keys, the last of each list, the most that a hidden one may be."""
    lists_ptr += 4 * group
    l0 = tl.load(lists_ptr, mask=there, other=0)
    l1 = tl.load(lists_ptr + 1, mask=there, other=0)
    l2 = tl.load(lists_ptr + 2, mask=there, other=0)
    first = group * GROUP
    k1, k2 = _key_in(l0, l1, first), _key_in(l1, l2, first)
    if DEPTH == 2:
        listed, last, bound = tl.join(k1, k2), k2, l2
    else:
        l3 = tl.load(lists_ptr + 3, mask=there, other=0)
        k3 = _key_in(l2, l3, first)
        listed, last, bound = tl.join(tl.join(k1, k2), tl.join(k3, k3 * 0)), k3, l3
    return listed.reshape([listed.numel]), last, _key_in(bound, bound * 0 - 1, first * 0)


@triton.jit
def _words(lists_ptr, left, C: tl.constexpr, POLL: tl.constexpr):
    """The words of C records, DEPTH 2, or of as many as are left."""
    at = tl.arange(0, C)
    there, ptrs = at < left, lists_ptr + 4 * at
    l0 = tl.load(ptrs, mask=there, other=0, volatile=POLL).to(tl.uint64, bitcast=True)
    l1 = tl.load(ptrs + 1, mask=there, other=0, volatile=POLL).to(tl.uint64, bitcast=True)
    l2 = tl.load(ptrs + 2, mask=there, other=0, volatile=POLL).to(tl.uint64, bitcast=True)
    return l0, l1, l2


@triton.jit
def _most_of(l0, l1, l2):
    """The greatest logit of these words, as `ordered`; POISONED if one is not written yet."""
    return tl.max(tl.maximum(order_of(l0), tl.maximum(order_of(l1), order_of(l2))), 0)


@triton.jit
def _key_of(most, x, ids):
    """The key of the greatest of x, which is given; 0 if none is left."""
    first = tl.min(tl.where(x == most, ids, NO_ID), 0)
    return tl.where(most > LOWEST, keyed(most, first), 0)


@triton.jit
def _key_at(keys, place):
    """The key at a place of `[LANES]`, by halves: each is one step of a warp."""
    key = tl.where(tl.arange(0, LANES) == place, keys, 0)
    high, low = tl.max((key >> 32).to(tl.uint32), 0), tl.max(key.to(tl.uint32), 0)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def _best_in_turn(lists_ptr, groups, k, GROUP: tl.constexpr, C: tl.constexpr, POLL: tl.constexpr):
    """A row's best listed keys `[LANES]`, the k-th, the largest logit, the sum of exponentials and
    the most that a hidden one may be: C groups at a time, the next on their way meanwhile."""
    at = tl.arange(0, LANES)
    top, bar = tl.zeros([LANES], tl.uint64), tl.full([], 0, tl.uint64)
    best, total = float("-inf"), tl.zeros([C], tl.float32)
    hidden = tl.full([C], LOWEST, tl.int32)
    l0, l1, l2 = _words(lists_ptr, groups, C, POLL)
    for start in range(0, groups, C):
        most = _most_of(l0, l1, l2)
        if POLL:
            while most == POISONED:
                l0, l1, l2 = _words(lists_ptr, groups - start, C, POLL)
                most = _most_of(l0, l1, l2)
        lists_ptr += 4 * C
        later0, later1, later2 = _words(lists_ptr, groups - start - C, C, POLL)
        group = start + tl.arange(0, C)
        x, id = order_of(l0), id_of(l1) + group * GROUP
        next_x, next_id = order_of(l1), id_of(l2) + group * GROUP
        hidden = tl.maximum(hidden, order_of(l2))

        before, best = best, tl.maximum(best, unordered(most))
        zero = _finite_or_zero(best)
        tops = tl.where(group < groups, unordered(x), float("-inf"))
        sums = l0.to(tl.uint32).to(tl.float32) * (1.0 / UNIT)
        total = total * tl.exp(before - zero) + sums * tl.exp(tops - zero)

        key = _key_of(most, x, id)
        while key > bar:  # about k / c times in the c-th chunk
            above = tl.gather(top, tl.maximum(at - 1, 0), 0)
            top = tl.maximum(top, tl.where(at == 0, key, tl.minimum(above, key)))
            bar = _key_at(top, k - 1)
            out = id == id_of(key)
            x, id = tl.where(out, next_x, x), tl.where(out, next_id, id)
            next_x = tl.where(out, LOWEST, next_x)
            key = _key_of(tl.max(x, 0), x, id)
        l0, l1, l2 = later0, later1, later2
    bound = tl.max(hidden, 0)
    bound = tl.where(bound > LOWEST, keyed(bound, bound * 0), 0)
    return top, bar, best, tl.sum(total, 0), bound


@triton.jit
def _most_hiding(lists_ptr, groups, bar, below, GROUP: tl.constexpr, C: tl.constexpr):
    """Of the groups that may hide a key above the bar, the greatest last listed key that is below
    the one given; 0 if none."""
    hiding = tl.zeros([C], tl.uint64)
    for start in range(0, groups, C):
        group = start + tl.arange(0, C)
        _, last, bound = _listed(lists_ptr, group, group < groups, GROUP, 2)
        hiding = tl.maximum(hiding, tl.where((bound > bar) & (last < below), last, 0))
    return tl.max(hiding, 0)


@triton.jit(do_not_specialize=["k", "n"])
def _merge_kernel(
    x_ptr, w_ptr, lists_ptr, values_ptr, ids_ptr, lse_ptr, V, H, groups, stride_x,
    stride_w, k, n, temperature_ptr, law_ptr, seed_ptr, position_ptr, base_ptr, parent_ptr,
    child_ptr, q_ptr, DOT: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr, DEPTH: tl.constexpr, LOG_C: tl.constexpr, LOG_K: tl.constexpr,
    LOG_IDS: tl.constexpr, IN_TURN: tl.constexpr, ONCE: tl.constexpr, DRAW: tl.constexpr,
    POLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: its groups into its k best and logsumexp; then the draw, if any.

    With POLL it starts while scan runs, takes each record as soon as it is written, and waits for
    scan's end only before its own, so that who waits for this kernel waits for both; scan reads
    nothing that is written here. All programs of scan and of what came before it have their place
    on the GPU by then, or have ended: none has to wait for that of one that polls.
    """
    K: tl.constexpr = 1 << LOG_K
    C: tl.constexpr = 1 << LOG_C
    row = tl.program_id(0).to(tl.int64)
    node = 0
    if DRAW:
        temperature, law = from_l2(temperature_ptr + row), from_l2(law_ptr + row)
        seed, position = from_l2(seed_ptr + row), from_l2(position_ptr + row)
        base = from_l2(base_ptr + row)
        if parent_ptr is not None:
            node = from_l2(parent_ptr + row)
    if PDL:
        if not POLL:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # A group may hide some of the best if its bound and all that it lists are above the k-th.
    lists_ptr += row * (4 * groups)
    at = tl.arange(0, K)
    if IN_TURN:
        top, bar, best, total, bound = _best_in_turn(lists_ptr, groups, k, GROUP, C, POLL)
        top = tl.gather(top, at, 0)
        bad = tl.abs(best) == float("inf")
        hiding = bar  # none
        if (bound > bar) & (bad == 0):
            if PDL and POLL:
                tl.extra.cuda.gdc_wait()
            hiding = _most_hiding(lists_ptr, groups, bar, tl.full([], ANY, tl.uint64), GROUP, C)
    else:
        best, total = float("-inf"), 0.0
        chosen = tl.zeros([K], tl.uint64)
        for start in range(0, 1 if ONCE else groups, C):  # of one, the sum fills the waits below
            group = start + tl.arange(0, C)
            there = group < groups
            stats = tl.load(lists_ptr + 4 * group, mask=there, other=0).to(tl.uint64, bitcast=True)
            order = order_of(stats)
            tops = tl.where(there, value_of(stats), float("-inf"))
            sums = stats.to(tl.uint32).to(tl.float32) * (1.0 / UNIT)
            some = best_keys(tl.where(there, keyed(order, group), 0), LOG_C, LOG_K)
            if start == 0:
                chosen = some
            else:
                chosen = best_keys(tl.join(chosen, some).reshape([2 * K]), LOG_K + 1, LOG_K)
            before, best = best, tl.maximum(best, tl.max(tops, 0))
            zero = _finite_or_zero(best)
            total = total * tl.exp(before - zero) + tl.sum(sums * tl.exp(tops - zero), 0)
        # The k best lie in the k groups whose own best are the greatest.
        listed, last, bound = _listed(lists_ptr, id_of(chosen), chosen != 0, GROUP, DEPTH)
        top = best_keys(listed, LOG_K + DEPTH - 1, LOG_K)
        bar = tl.max(tl.where(at == k - 1, top, 0), 0)
        bad = tl.abs(best) == float("inf")
        last = tl.where(bad, 0, tl.where(bound > bar, last, 0))
        hiding = tl.max(last, 0)
    while hiding > bar:
        anew = _anew(x_ptr + row * stride_x, w_ptr, id_of(hiding) // GROUP, V, H, stride_w, DOT,
                     EVEN_H, BLOCK_H, GROUP, 1 << LOG_IDS)  # fmt: skip
        top = tl.where(id_of(top) // GROUP == id_of(hiding) // GROUP, 0, top)
        anew = best_keys(anew, LOG_IDS, LOG_K)
        top = best_keys(tl.join(top, anew).reshape([2 * K]), LOG_K + 1, LOG_K)
        bar = tl.max(tl.where(at == k - 1, top, 0), 0)
        if IN_TURN:
            hiding = _most_hiding(lists_ptr, groups, bar, hiding, GROUP, C)
        else:
            last = tl.where(bound > bar, tl.where(last < hiding, last, 0), 0)
            hiding = tl.max(last, 0)

    values = tl.where(bad, float("nan"), value_of(top))
    ids = tl.where(bad, -1, tl.where(at < k, id_of(top), -1))
    tl.store(values_ptr + row * k + at, values, mask=at < k)
    tl.store(ids_ptr + row * k + at, ids, mask=at < k)
    lse = _finite_or_zero(best) + tl.log(total)
    tl.store(lse_ptr + row, tl.where(bad, float("nan"), lse))
    if DRAW:
        q, children = draw(values, ids, temperature, law, seed, position, base, node, LOG_K)
        tl.store(q_ptr + row * k + at, q, mask=at < k)
        tl.store(child_ptr + row * n + at, children, mask=at < n)
    if PDL and POLL:
        tl.extra.cuda.gdc_wait()


def config_of(halves: bool, row_tile: int) -> Config:
    """The configuration for a row tile; tilings of the same dtype have the same bits."""
    if not halves:
        return SINGLES
    return MANY_ROWS if row_tile == 64 else HALVES


def launch(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    out: tuple[Tensor, ...],
    draft: tuple[Tensor | None, ...] = (),
    n: int = 0,
    *,
    config: Config | None = None,
    row_tile: int | None = None,
    poll: bool | None = None,
) -> bool:
    """Fill `out`; False for arguments left to the reference.

    `draft` is temperature, law, seed, position, base, parent of a draw of n children, which also
    fills `out[3:]`. `config`, `row_tile` and `poll` are for measuring; left out, the shapes and the
    device decide.
    """
    rows, (vocab, size) = hidden.shape[0], lm_head.shape
    float64 = norm_weight is not None and norm_weight.dtype is torch.float64
    if hidden.dtype is torch.float64 or float64 or not size:
        return False
    if not rows:
        return True
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, lm_head))
    log_k, halves = log2_up(k), weight.element_size() == 2 == x.element_size()
    row_tile = row_tile or next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
    width, device = weight.element_size(), x.device
    aligned = (weight.data_ptr() | weight.stride(0) * width | size * width) % 16 == 0
    config = config or config_of(halves and aligned, row_tile)
    groups = triton.cdiv(vocab, config.group)
    # The interpreter's product of bfloat16 is wrong; on a GPU float32 is for float32 alone.
    single = not halves or device.type == "cpu"
    blackwell = architecture(device) >= 100 and not single
    dot = tl.float32 if single else tl.bfloat16 if x.dtype is torch.bfloat16 else tl.float16
    stage = config.block_h * (config.block_v * width + row_tile * x.element_size())
    pdl, in_turn = overlap(x), log_k <= IN_TURN
    poll = (pdl["PDL"] if poll is None else poll) and in_turn and norm_weight is not None

    lists = torch.empty(rows, groups, 4, dtype=torch.int64, device=device)
    if norm_weight is not None:
        normed = x.new_empty(rows, size)
        block, warps = tile_of(size)
        _prepare_kernel[(rows, 1 + (triton.cdiv(4 * groups, block) if poll else 0))](
            x, norm_weight.contiguous(), normed, lists, x.stride(0), size, groups, eps,
            WHOLE=size <= block, BLOCK=block, num_warps=warps, **pdl,
        )  # fmt: skip
        x = normed
    depth = depth_of(log_k)
    _scan_kernel[(triton.cdiv(rows, row_tile), triton.cdiv(vocab, config.block_v))](
        x, weight, lists, rows, vocab, size, groups, x.stride(0), weight.stride(0), DOT=dot,
        EVEN_V=vocab % config.block_v == 0, EVEN_H=size % config.block_h == 0,
        BLOCK_V=config.block_v, BLOCK_H=config.block_h, ROWS=row_tile, GROUP=config.group,
        DEPTH=depth, X_LEFT=config.x_left,
        # On sm_100 a warp holds whole rows of the accumulator, and 64 columns are too many to list.
        num_warps=2 * config.warps if blackwell and row_tile * depth > 128 else config.warps,
        # Else ptxas spills a word to fit a program more, for which no memory is left.
        maxnreg=None if single else 255,
        num_stages=max(1, min(config.stages, (shared_memory(device) - 4096) // stage)), **pdl,
    )  # fmt: skip
    drawn = (*draft, *out[3:]) if draft else (None,) * 8
    merge_h = min(MERGE_H, config.block_h // 2)
    if in_turn:
        log_c = log2_up(CHUNK) + (groups >= MANY_GROUPS)
    else:
        log_c = max(log2_up(min(groups, MOST_SORTED)), log_k)
    _merge_kernel[(rows,)](
        x, weight, lists, *out[:3], vocab, size, groups, x.stride(0), weight.stride(0), k,
        n, *drawn, DOT=dot, EVEN_H=size % merge_h == 0, BLOCK_H=merge_h, GROUP=config.group,
        DEPTH=depth, LOG_C=log_c, LOG_K=log_k, LOG_IDS=max(log2_up(config.group), log_k),
        IN_TURN=in_turn, ONCE=not in_turn and groups <= 1 << log_c, DRAW=bool(draft), POLL=poll,
        num_warps=1 if in_turn else max(4, min(8, (1 << log_c) // 512)),
        num_stages=6, maxnreg=None if device.type == "cpu" else 255,  # else ptxas spills a word
        **pdl,
    )  # fmt: skip
    return True


def new_outputs(hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for values, ids and logsumexp."""
    rows, device = hidden.shape[0], hidden.device
    return (
        torch.empty(rows, k, dtype=torch.float32, device=device),
        torch.empty(rows, k, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def exit_topk(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...] | None:
    out = out or new_outputs(hidden, k)
    return out if launch(hidden, lm_head, k, norm_weight, eps, out) else None
