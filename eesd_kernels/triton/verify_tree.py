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
from eesd_kernels.triton.levels import above_zero, at_level
from eesd_kernels.triton.nodes import chosen_of, depths, next_child, weigh
from eesd_kernels.triton.random import accept_uniform, words_of
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
    mass_of,
    merge,
    merge_races,
    pick,
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
    node, split = tl.arange(0, NODES), tl.arange(0, SPLITS)
    number = tl.minimum(tl.maximum(tl.load(num_nodes_ptr + b), 0), nodes)
    temperature, law = tl.load(temperature_ptr + b), tl.load(law_ptr + b)
    seed, position, base = tl.load(seed_ptr + b), tl.load(position_ptr + b), tl.load(base_ptr + b)
    c = exponent(temperature)
    # By matching: the token of a row is known, and the child that is that token stands.
    greedy = (temperature > 0) == 0
    matching = greedy | (law == COUPLED)
    fixed = (law == DETERMINISTIC) | (q_probs_ptr is None)

    # [NODES]: parents, tokens and their logits in the parent's row.
    live = node < number
    parent = tl.load(parent_ptr + b * nodes + node, mask=live & (node > 0), other=-1)
    parent = tl.where((parent >= 0) & (parent < node), parent, -1)
    t = tl.load(node_ids_ptr + b * nodes + node, mask=parent >= 0, other=-1)
    known = (t >= 0) & (t < vocab)
    row_ptr = logits_ptr + b * stride_b
    at = tl.where(parent >= 0, parent, 0).to(tl.int64) * stride_r + tl.where(known, t, 0)
    x_t = tl.load(row_ptr + at, mask=known, other=float("-inf")).to(tl.float32)
    if cutoff_ptr is not None:
        at = cutoff_ptr + b * nodes + parent
        x_t = tl.where(x_t < tl.load(at, mask=known, other=0.0), float("-inf"), x_t)
    depth = depths(parent_ptr + b * nodes, parent)
    twin = (parent[:, None] == parent[None, :]) & (t[:, None] == t[None, :])
    twin = twin & (node[None, :] < node[:, None])
    fresh = known & (tl.max(twin.to(tl.int32), 1) == 0)
    first = next_child(parent, node, node, NODES)
    if SPARSE:  # [NODES, WIDTH]: the laws' ids, weights and target logits
        col = tl.arange(0, WIDTH)
        at = (b * nodes + node)[:, None] * k + col[None, :]
        listed = live[:, None] & (col < k)[None, :]
        ids = tl.load(q_ids_ptr + at, mask=listed, other=-1)
        w = tl.load(q_probs_ptr + at, mask=listed, other=0.0)
        inside = (ids >= 0) & (ids < vocab)
        at = node[:, None].to(tl.int64) * stride_r + tl.where(inside, ids, 0)
        x = tl.load(row_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        if cutoff_ptr is not None:
            cutoff = tl.load(cutoff_ptr + b * nodes + node, mask=live, other=float("-inf"))
            x = tl.where(x < cutoff[:, None], float("-inf"), x)
        ids, w = tl.where(inside, ids, -1), tl.where(inside, w, 0.0)

    if PDL:  # all above is the caller's and was there before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = partial_ptr + (b * nodes + node)[:, None] * 4 * splits + split[None, :]
    mask = live[:, None] & (split < splits)[None, :]
    tops = tl.load(at + TOP * splits, mask=mask, other=float("-inf"))
    sums = tl.load(at + SUM * splits, mask=mask, other=0.0)
    keys = tl.load(at + KEY * splits, mask=mask, other=float("inf"))
    who = tl.load(at + ID * splits, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    top, norm = merge(tops, sums, c, 1)
    bad = (norm > 0) == 0
    norm = norm.to(tl.float64)
    key, raced = merge_races(keys, tops, who, top, c, 1)
    best = tl.min(tl.where(tops == top[:, None], who, NO_ID), 1)
    token = tl.where(greedy, best, raced)

    # The child that each node's walk would go on to, NODES where none.
    onward = tl.full([NODES], NODES, tl.int32)
    s = norm  # all that is left of p
    if SPARSE:  # on the laws' ids, and outside them
        r = mass_of(x, top[:, None], c)
        outside = above_zero(norm - tl.sum(r, 1))
        w_all = tl.sum(w.to(tl.float64), 1)
    if matching:
        same = (parent[None, :] == node[:, None]) & (t[None, :] == token[:, None])
        onward = tl.min(tl.where(same & known[None, :], node[None, :], NODES), 1)
    else:
        p_t = mass_of(x_t, chosen_of(top, node[None, :] == parent[:, None], float("-inf")), c)
        p_t = tl.where(fresh, p_t, -1.0).to(tl.float32)
        child, sibling = first, 0
        while tl.min(child, 0) < NODES:
            here = node[None, :] == child[:, None]
            word, _, _, _ = words_of(
                tl.full([NODES], 0, tl.int32) + sibling, position + depth + 1, base, ACCEPT, seed
            )
            u = accept_uniform(word).to(tl.float64)
            stands = child < 0
            if fixed:
                r_c = chosen_of(p_t, here, -1.0).to(tl.float64)
                stands = u * s < r_c
                s = tl.where(r_c > 0, above_zero(s - r_c), s)
            elif SPARSE:
                t_c = chosen_of(tl.where(fresh, t, -2), here, -2)
                place = tl.min(tl.where(ids == t_c[:, None], col[None, :], WIDTH), 1)
                drawn = (place < WIDTH) & (w_all != 0)
                s = tl.sum(r, 1) + outside
                at_place = (col[None, :] == place[:, None]) & drawn[:, None]
                w_c = tl.sum(tl.where(at_place, w, 0.0), 1).to(tl.float64)
                r_c = tl.sum(tl.where(at_place, r, 0.0), 1)
                stands = drawn & (u * w_c * s < r_c * w_all)
                fell = drawn & (stands == 0)
                less = above_zero(r - (s / w_all)[:, None] * w.to(tl.float64))
                r = tl.where(fell[:, None], tl.where(at_place, 0.0, less), r)
                w = tl.where(at_place & fell[:, None], 0.0, w)
                w_all = tl.sum(w.to(tl.float64), 1)
            onward = tl.where(stands, child, onward)
            child = tl.where(onward < NODES, NODES, next_child(parent, node, child, NODES))
            sibling += 1
    onward = tl.where(bad, NODES, onward)

    # From the root along them, as far as they lead.
    last, m, walked = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), node == 0
    step = tl.sum(tl.where(node == 0, onward, 0), 0)
    while step < NODES:
        last, m, walked = step, m + 1, walked | (node == step)
        step = tl.sum(tl.where(node == step, onward, 0), 0)
    failed = (tl.max((bad & (node == last)).to(tl.int32), 0) > 0) & (number > 0)

    # The last row's ids that the walk weighs itself.
    end, place = node == last, position + m + 1
    next_token, top_m = tl.sum(tl.where(end, token, 0), 0), at_level(top, node, last)
    inside_key = tl.full([], float("inf"), tl.float32)
    inside_id, rest_id = tl.full([], NO_ID, tl.int32), tl.full([], NO_ID, tl.int32)
    if matching == 0:
        lane = tl.arange(0, COUNT)
        if not FOLD:
            tl.store(excluded_ptr + b * count + lane, -1, mask=lane < count)
            tl.debug_barrier()
        if fixed:  # its children, of which nothing is left
            theirs = tl.where((parent == last) & known, t, -1)
            p_c = mass_of(x_t, top_m, c)
            inside_key, inside_id, rest_id = weigh(theirs, p_c * 0.0, p_c, place, base, seed)
            if not FOLD:
                tl.store(excluded_ptr + b * count + node, theirs, mask=node < nodes)
        elif SPARSE:
            ids_m = tl.max(tl.where(end[:, None], ids, -1), 0)
            row = row_ptr + last.to(tl.int64) * stride_r
            x_m = tl.load(row + ids_m, mask=ids_m >= 0, other=float("-inf")).to(tl.float32)
            if cutoff_ptr is not None:
                x_m = tl.where(x_m < tl.load(cutoff_ptr + b * nodes + last), float("-inf"), x_m)
            p_m = mass_of(x_m, top_m, c)
            r_m = tl.sum(tl.where(end[:, None], r, 0.0), 0)
            left = tl.sum(tl.where(ids_m >= 0, r_m, 0.0), 0)
            # NaN: a draft law without sense takes nothing.
            r_m = tl.where(left == left, r_m, p_m)
            inside_key, inside_id, rest_id = weigh(ids_m, r_m, p_m, place, base, seed)
            if not FOLD:
                tl.store(excluded_ptr + b * count + col, ids_m, mask=col < k)
    if FOLD:
        key_m = tl.min(tl.where(end, key, float("inf")), 0)
        chosen = pick(key_m, next_token, 1.0, inside_key, inside_id, rest_id)
        next_token = tl.where(matching, next_token, chosen)
    else:
        next_token = tl.where(matching, next_token, -1)  # else the race writes it
        stop = stop_ptr + b * STOP
        tl.store(stop + ROW, tl.where(matching | failed | (number == 0), -1, last))
        tl.store(stop + PLACE, m)
        tl.store(stop + DEPTH, m)
        tl.store(stop + SCALE, 0x3F800000)
        tl.store(stop + INSIDE_KEY, inside_key.to(tl.int32, bitcast=True))
        tl.store(stop + INSIDE_ID, inside_id)
        tl.store(stop + REST_ID, rest_id)
        tl.store(stop + ARRIVED, 0)

    nothing = failed | (number == 0)
    walked = walked & (nothing == 0)
    path = chosen_of(node, walked[None, :] & (depth[None, :] == node[:, None]), -1)
    tokens = chosen_of(t, walked[None, :] & (depth[None, :] == node[:, None] + 1), -1)
    tokens = tl.where((node == m) & (nothing == 0), next_token, tokens)
    at = b * nodes + node
    tl.store(path_ptr + at, path, mask=node < nodes)
    tl.store(token_ids_ptr + at, tokens, mask=node < nodes)
    tl.store(accepted_ptr + b, tl.where(nothing, 0, m))
    tl.store(status_ptr + b, failed.to(tl.int32))


def _warps(tile: int) -> int:
    return 1 if tile <= 512 else 4 if tile <= 1024 else 8 if tile <= 4096 else 16


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

    fold = rows.folds(logits, walk=2)
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
