"""verify_tree from logits: statistics of the live rows, one walk a sequence, one race.

What happens at a node depends on its row, its children and its noise alone, so the walk's program
tests all nodes at once, sibling by sibling, and follows the accepted children from the root when
all is known. Draft laws are a tile `[NODES, WIDTH]`; who is whose child, one `[NODES, NODES]`. The
numbers of a node are float64, made of float32 sums. Launches, and what races where, as in
`verify_linear.py`. Dense draft laws are left to the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton import rows
from eesd_kernels.triton.launch import overlap
from eesd_kernels.triton.levels import at_level
from eesd_kernels.triton.nodes import lineage, offer_drawn, offer_fixed, pack, weigh
from eesd_kernels.triton.random import words_of
from eesd_kernels.triton.rows import (
    ARRIVED,
    DEPTH,
    ID,
    INSIDE_ID,
    INSIDE_KEY,
    KEY,
    PLACE,
    REST_ID,
    ROW,
    SCALE,
    STOP,
    SUM,
    TOP,
)
from eesd_kernels.triton.splits import (
    COUPLED,
    DETERMINISTIC,
    NO_ID,
    exponent,
    from_l2,
    mass_of,
    merge,
    merge_races,
    pick,
    some_from_l2,
)
from eesd_kernels.triton.target_law import cutoffs

ACCEPT = tl.constexpr(3)  # the purpose of a test's noise
MOST_NODES = 64  # more are left to the reference


@triton.jit
def _walk_kernel(
    logits_ptr, stride_b, stride_r, node_ids_ptr, parent_ptr, num_nodes_ptr, q_ids_ptr,
    q_probs_ptr, law_ptr, temperature_ptr, cutoff_ptr, seed_ptr, position_ptr, base_ptr,
    partial_ptr, stop_ptr, excluded_ptr, accepted_ptr, path_ptr, token_ids_ptr, status_ptr,
    nodes, vocab, splits, k, count, NODES: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    SPARSE: tl.constexpr = q_ids_ptr is not None
    b = tl.program_id(0).to(tl.int64)
    node, split, col = tl.arange(0, NODES), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    number = tl.minimum(tl.maximum(from_l2(num_nodes_ptr + b), 0), nodes)
    temperature, law = from_l2(temperature_ptr + b), from_l2(law_ptr + b)
    seed, position, base = from_l2(seed_ptr + b), from_l2(position_ptr + b), from_l2(base_ptr + b)
    # [NODES]: parents, tokens and their logits in the parent's row.
    live = node < number
    parent = some_from_l2(parent_ptr + b * nodes + node, live & (node > 0), -1)
    parent = tl.where((parent >= 0) & (parent < node), parent, -1)
    up = tl.maximum(parent, 0)
    t = some_from_l2(node_ids_ptr + b * nodes + node, parent >= 0, -1)
    if SPARSE:  # [NODES, WIDTH]: the laws' ids and weights, and the ids of the parents'
        at = (b * nodes + node)[:, None] * k + col[None, :]
        listed = live[:, None] & (col < k)[None, :]
        ids = some_from_l2(q_ids_ptr + at, listed, -1)
        w = some_from_l2(q_probs_ptr + at, listed, 0.0)
        at = (b * nodes + up)[:, None] * k + col[None, :]
        above = some_from_l2(q_ids_ptr + at, (parent >= 0)[:, None] & (col < k)[None, :], -1)
    known = (t >= 0) & (t < vocab)
    row_ptr = logits_ptr + b * stride_b
    at = up.to(tl.int64) * stride_r + tl.where(known, t, 0)
    x_t = some_from_l2(row_ptr + at, known, float("-inf")).to(tl.float32)
    if SPARSE:  # and the target's logits of the laws' ids
        inside = (ids >= 0) & (ids < vocab)
        at = node[:, None].to(tl.int64) * stride_r + tl.where(inside, ids, 0)
        x = some_from_l2(row_ptr + at, inside, float("-inf")).to(tl.float32)
        ids, w = tl.where(inside, ids, -1), tl.where(inside, w, 0.0)
    if cutoff_ptr is not None:
        cutoff = some_from_l2(cutoff_ptr + b * nodes + node, live, float("-inf"))
        x_t = tl.where(x_t < tl.gather(cutoff, up, 0), float("-inf"), x_t)
        if SPARSE:
            x = tl.where(x < cutoff[:, None], float("-inf"), x)
    # By matching: the token of a row is known, and the child that is that token stands.
    c, greedy = exponent(temperature), (temperature > 0) == 0
    matching = greedy | (law == COUPLED)
    fixed = (law == DETERMINISTIC) | (q_probs_ptr is None)
    depth, first, sibling, following, fresh = lineage(parent, t, node, NODES)
    fresh = fresh & known
    most = tl.max(tl.where(parent >= 0, sibling + 1, 0), 0)
    word, _w1, _w2, _w3 = words_of(sibling, position + depth, base, ACCEPT, seed)
    place = tl.full([NODES], 0, tl.int32)
    if SPARSE:  # of a token in the law that may have drawn it; WIDTH where it cannot
        place = tl.min(tl.where(above == t[:, None], col[None, :], WIDTH), 1)
        place = tl.where(fresh, place, WIDTH)
    offered = pack(word, place, following)

    if PDL:  # all above is the caller's and was there before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = partial_ptr + (b * nodes + node)[:, None] * 4 * splits + split[None, :]
    mask = live[:, None] & (split < splits)[None, :]
    tops = tl.load(at + TOP * splits, mask=mask, other=float("-inf"))
    sums = tl.load(at + SUM * splits, mask=mask, other=0.0)
    key_at = at + KEY * splits
    top, norm = merge(tops, sums, c, 1)
    bad = (norm > 0) == 0
    norm = norm.to(tl.float64)

    # The children that stand, each as if the walk came to its parent.
    token = tl.full([NODES], -1, tl.int32)
    if SPARSE:
        r = tl.zeros([NODES, WIDTH], tl.float64)  # what is left of p on the laws' ids
    if matching:
        keys = tl.load(key_at, mask=mask, other=float("inf"))
        who = tl.load(key_at + splits, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        if greedy:
            token = tl.min(tl.where(tops == top[:, None], who, NO_ID), 1)
        else:
            _key, token = merge_races(keys, tops, who, top, c, 1)
        taken = t == tl.gather(tl.where(bad, -1, token), up, 0)
    elif fixed:
        p_t = tl.where(fresh, mass_of(x_t, tl.gather(top, up, 0), c), -1.0).to(tl.float32)
        onward = offer_fixed(p_t, norm, offered, first, most, NODES)
        taken = node == tl.gather(tl.where(bad, NODES, onward), up, 0)
    elif SPARSE:
        r = mass_of(x, top[:, None], c)
        onward, r = offer_drawn(r, w, norm, offered, first, most, NODES, WIDTH)
        taken = node == tl.gather(tl.where(bad, NODES, onward), up, 0)
    else:
        taken = node < 0
    taken = taken & known

    # From the root along them, as far as they lead.
    last, m, walked = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), node == 0
    step = tl.min(tl.where(taken & (parent == 0), node, NODES), 0)
    while step < NODES:
        last, m, walked = step, m + 1, walked | (node == step)
        step = tl.min(tl.where(taken & (parent == step), node, NODES), 0)
    end, place_m = node == last, position + m + 1
    failed = (tl.max((end & bad).to(tl.int32), 0) > 0) & (number > 0)
    nothing = failed | (number == 0)

    # The last row's race outside the ids that the walk weighs itself, if it was run, and theirs.
    top_m, next_token = at_level(top, node, last), tl.sum(tl.where(end, token, 0), 0)
    if FOLD:
        at = partial_ptr + (b * nodes + last) * 4 * splits + split
        mine = (split < splits) & (matching == 0)
        tops_m = tl.load(at + TOP * splits, mask=mine, other=float("-inf"))
        keys_m = tl.load(at + KEY * splits, mask=mine, other=float("inf"))
        who_m = tl.load(at + ID * splits, mask=mine, other=0.0).to(tl.int32, bitcast=True)
    if matching == 0:
        inside_key = tl.full([], float("inf"), tl.float32)
        inside_id, rest_id = tl.full([], NO_ID, tl.int32), tl.full([], NO_ID, tl.int32)
        if fixed:  # its children, of which nothing is left
            theirs = tl.where((parent == last) & known, t, -1)
            p_c = mass_of(x_t, top_m, c)
            inside_key, inside_id, rest_id = weigh(theirs, p_c * 0.0, p_c, place_m, base, seed)
            if not FOLD:
                tl.store(excluded_ptr + b * count + node, theirs, mask=node < nodes)
        elif SPARSE:
            ids_m = tl.max(tl.where(end[:, None], ids, -1), 0)
            p_m = mass_of(tl.sum(tl.where(end[:, None], x, 0.0), 0), top_m, c)
            r_m = tl.sum(tl.where(end[:, None], r, 0.0), 0)
            left = tl.sum(tl.where(ids_m >= 0, r_m, 0.0), 0)
            # NaN: a draft law without sense takes nothing.
            r_m = tl.where(left == left, r_m, p_m)
            inside_key, inside_id, rest_id = weigh(ids_m, r_m, p_m, place_m, base, seed)
            if not FOLD:
                tl.store(excluded_ptr + b * count + col, ids_m, mask=col < k)
        if FOLD:
            key_m, next_token = merge_races(keys_m, tops_m, who_m, top_m, c, 0)
            next_token = pick(key_m, next_token, 1.0, inside_key, inside_id, rest_id)
        else:
            lane, used = tl.arange(0, COUNT), tl.where(fixed, nodes, k)
            tl.store(excluded_ptr + b * count + lane, -1, mask=(lane >= used) & (lane < count))
            stop = stop_ptr + b * STOP
            tl.store(stop + PLACE, m)
            tl.store(stop + DEPTH, m)
            tl.store(stop + SCALE, 0x3F800000)
            tl.store(stop + INSIDE_KEY, inside_key.to(tl.int32, bitcast=True))
            tl.store(stop + INSIDE_ID, inside_id)
            tl.store(stop + REST_ID, rest_id)
            tl.store(stop + ARRIVED, 0)
    if not FOLD:  # the race writes the token, unless there is nothing to race for
        next_token = tl.where(matching, next_token, -1)
        tl.store(stop_ptr + b * STOP + ROW, tl.where(matching | nothing, -1, last))

    at = b * nodes + node
    walked, behind = walked & (nothing == 0), (node < nodes) & ((node > m) | nothing)
    tl.store(path_ptr + b * nodes + depth, node, mask=walked)
    tl.store(path_ptr + at, -1, mask=behind)
    tl.store(token_ids_ptr + b * nodes + depth - 1, t, mask=walked & (node > 0))
    tl.store(token_ids_ptr + at, tl.where(behind, -1, next_token), mask=behind | (node == m))
    tl.store(accepted_ptr + b, tl.where(nothing, 0, m))
    tl.store(status_ptr + b, failed.to(tl.int32))


def _warps(tile: int) -> int:
    return 1 if tile <= 512 else 4 if tile <= 2048 else 8 if tile <= 4096 else 16


def verify_tree(
    target_logits: Tensor,
    node_ids: Tensor,
    parent: Tensor,
    num_nodes: Tensor,
    q_ids: Tensor | None,
    q_probs: Tensor | None,
    law: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...] | None:
    batch, nodes, vocab = target_logits.shape
    if target_logits.dtype is torch.float64 or not 0 < nodes <= MOST_NODES:
        return None
    if q_probs is not None and (q_ids is None or q_ids.shape[2] == 0):
        return None
    logits = target_logits if target_logits.stride(2) == 1 else target_logits.contiguous()
    node_ids, parent, number, law = (x.contiguous() for x in (node_ids, parent, num_nodes, law))
    temperature, seed, position, base = (
        x.contiguous() for x in (temperature, seed, position, base)
    )
    accepted, path, token_ids, status = out or (
        number.new_empty(batch), number.new_empty(batch, nodes), number.new_empty(batch, nodes),
        number.new_empty(batch),
    )  # fmt: skip
    if batch == 0:
        return accepted, path, token_ids, status
    q_ids = None if q_ids is None else q_ids.contiguous()
    q_probs = None if q_probs is None else q_probs.contiguous()
    k = 1 if q_ids is None else q_ids.shape[2]
    cutoff = None
    if not (top_k is None and top_p is None and min_p is None):
        cutoff = cutoffs(logits, number, temperature, top_k, top_p, min_p)

    fold = rows.folds(logits)
    partial = rows.new_partial(logits)
    rows.statistics(
        logits, number, law, temperature, seed, position, base, partial, bonus=0, cutoff=cutoff,
        parent=parent, fold=fold, child_ids=node_ids, q_ids=q_ids,
    )  # fmt: skip
    splits, count = partial.shape[3], max(k, nodes)
    stop = excluded = None
    if not fold:
        stop, excluded = number.new_empty(batch, STOP.value), number.new_empty(batch, count)
    width, across, listed = (triton.next_power_of_2(x) for x in (nodes, splits, k))
    _walk_kernel[(batch,)](
        logits, logits.stride(0), logits.stride(1), node_ids, parent, number, q_ids, q_probs, law,
        temperature, cutoff, seed, position, base, partial, stop, excluded, accepted, path,
        token_ids, status, nodes, vocab, splits, k, count, NODES=width, SPLITS=across,
        WIDTH=listed, COUNT=triton.next_power_of_2(count), FOLD=fold,
        num_warps=_warps(width * max(width, across, listed)),
        **overlap(logits),
    )  # fmt: skip
    if stop is not None and excluded is not None:
        rows.race(
            logits, temperature, seed, position, base, partial, stop, excluded, token_ids,
            cutoff=cutoff,
        )  # fmt: skip
    return accepted, path, token_ids, status
