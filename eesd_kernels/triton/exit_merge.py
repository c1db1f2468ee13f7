"""The merge of `exit_topk`: a row's records into its best and its logsumexp; then the draw, if any.

Few are found one after the other by one warp, chunk by chunk of records, many by sorting the groups
by their own best. What a group may hide is computed anew (`_anew`), by the scan's own product.
"""

import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.exit_scan import UNIT, WARP, Config, dot_of
from eesd_kernels.triton.keys import (
    best_keys,
    id_of,
    keyed,
    order_of,
    pack,
    unordered,
    value_of,
    zero_unless_finite,
)
from eesd_kernels.triton.launch import overlap
from eesd_kernels.triton.linear import product
from eesd_kernels.triton.sample_draft import draw, log2_up
from eesd_kernels.triton.splits import NO_ID, from_l2

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
        zero = zero_unless_finite(best)
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
            zero = zero_unless_finite(best)
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
    lse = zero_unless_finite(best) + tl.log(total)
    tl.store(lse_ptr + row, tl.where(bad, float("nan"), lse))
    if DRAW:
        q, children = draw(values, ids, temperature, law, seed, position, base, node, LOG_K)
        tl.store(q_ptr + row * k + at, q, mask=at < k)
        tl.store(child_ptr + row * n + at, children, mask=at < n)
    if PDL and POLL:
        tl.extra.cuda.gdc_wait()


def merge(
    x: Tensor,
    weight: Tensor,
    lists: Tensor,
    k: int,
    out: tuple[Tensor, ...],
    draft: tuple[Tensor | None, ...],
    n: int,
    config: Config,
    depth: int,
    poll: bool,
) -> None:
    """Fill `out` from the records of `scan`, which had this config and depth.

    `poll`: the records were poisoned before scan began, and k is at most 2^IN_TURN.
    """
    (rows, size), vocab, groups = x.shape, weight.shape[0], lists.shape[1]
    log_k, drawn = log2_up(k), (*draft, *out[3:]) if draft else (None,) * 8
    in_turn, merge_h = log_k <= IN_TURN, min(MERGE_H, config.block_h // 2)
    if in_turn:
        log_c = log2_up(CHUNK) + (groups >= MANY_GROUPS)
    else:
        log_c = max(log2_up(min(groups, MOST_SORTED)), log_k)
    _merge_kernel[(rows,)](
        x, weight, lists, *out[:3], vocab, size, groups, x.stride(0), weight.stride(0), k, n,
        *drawn, DOT=dot_of(x, weight), EVEN_H=size % merge_h == 0, BLOCK_H=merge_h,
        GROUP=config.group, DEPTH=depth, LOG_C=log_c, LOG_K=log_k,
        LOG_IDS=max(log2_up(config.group), log_k), IN_TURN=in_turn,
        ONCE=not in_turn and groups <= 1 << log_c, DRAW=bool(draft), POLL=poll,
        num_warps=1 if in_turn else max(4, min(8, (1 << log_c) // 512)),
        num_stages=6, maxnreg=None if x.device.type == "cpu" else 255,  # else ptxas spills a word
        **overlap(x),
    )  # fmt: skip
