"""verify_tree from logits: statistics of the live rows, one walk a sequence, one race.

What happens at a node depends on its row, its children and its noise alone, so the walk's program
tests all nodes at once, sibling by sibling, races where each would end, and follows the accepted
children from the root when all is known: one program's latency, so all that the rows do not change
is worked out before their statistics are there. Draft laws are a tile `[NODES, WIDTH]`; who is
whose child, one `[NODES, NODES]`. The numbers of a node are float64, made of float32 sums.
Launches, and what races where, as in `verify_linear.py`. Dense draft laws are left to the
reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton import rows
from eesd_kernels.triton.launch import overlap
from eesd_kernels.triton.levels import at_level
from eesd_kernels.triton.nodes import (
    bits_of,
    lineage,
    noise_of,
    offer_drawn,
    offer_fixed,
    pack,
    turns,
    weigh,
)
from eesd_kernels.triton.random import words_of
from eesd_kernels.triton.rows import (
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
    nodes, vocab, splits, count, K: tl.constexpr, NODES: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    SPARSE: tl.constexpr = q_ids_ptr is not None
    AHEAD: tl.constexpr = NODES * WIDTH <= 2048  # else what is worked out ahead would spill
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
        at = (b * nodes + node)[:, None] * K + col[None, :]
        listed = live[:, None] & (col < K)[None, :]
        ids = some_from_l2(q_ids_ptr + at, listed, -1)
        w = some_from_l2(q_probs_ptr + at, listed, 0.0)
        at = (b * nodes + up)[:, None] * K + col[None, :]
        above = some_from_l2(q_ids_ptr + at, (parent >= 0)[:, None] & (col < K)[None, :], -1)
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
    depth, way, first, elders, following, fresh = lineage(parent, t, node, NODES)
    fresh = fresh & known
    sibling = tl.sum(elders.to(tl.int32), 1)
    most = tl.max(tl.where(parent >= 0, sibling + 1, 0), 0)
    word, _w1, _w2, _w3 = words_of(sibling, position + depth, base, ACCEPT, seed)
    place = tl.full([NODES], 0, tl.int32)
    if SPARSE:  # of a token in the law that may have drawn it; WIDTH where it cannot
        place = tl.min(tl.where(above == t[:, None], col[None, :], WIDTH), 1)
        place = tl.where(fresh, place, WIDTH)
    offered = pack(word, place, following)
    # The race's noise of the ids that the walk weighs itself.
    noise_t = noise_of(t, position + depth, base, seed)
    if SPARSE:
        if AHEAD:
            noise = noise_of(ids, (position + depth + 1)[:, None], base, seed)
        when, u, share, drawn = turns(w, offered, first, most, NODES, WIDTH, AHEAD)

    if PDL:  # all above is the caller's and was there before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = partial_ptr + (b * nodes + node)[:, None] * 4 * splits + split[None, :]
    mask = live[:, None] & (split < splits)[None, :]
    tops = tl.load(at + TOP * splits, mask=mask, other=float("-inf"))
    sums = tl.load(at + SUM * splits, mask=mask, other=0.0)
    raced = mask & (FOLD | matching)
    keys = tl.load(at + KEY * splits, mask=raced, other=float("inf"))
    who = tl.load(at + ID * splits, mask=raced, other=0.0).to(tl.int32, bitcast=True)
    if SPARSE:  # once more: a load here gives the laws' tiles their own layout from here on
        at = (b * nodes + node)[:, None] * K + col[None, :]
        w = some_from_l2(q_probs_ptr + at, listed & (ids >= 0), 0.0)
    top, norm = merge(tops, sums, c, 1)
    bad = (norm > 0) == 0
    dead = bad.to(tl.int32)
    if AHEAD:  # every warp gets all nodes', and a maximum over nodes stays within a warp
        dead = tl.gather(dead, node, 0)
    norm = norm.to(tl.float64)
    key, token = tl.full([NODES], float("inf"), tl.float32), tl.full([NODES], -1, tl.int32)
    if FOLD | matching:
        # Greedy: the splits with the row's top win. No branch, so that all this overlaps.
        keys = tl.where(greedy, tl.where(tops == top[:, None], 0.0, float("inf")), keys)
        key, token = merge_races(keys, tops, who, top, c, 1)

    # The children that stand, each as if the walk came to its parent; in a bad row, none.
    inside_key = tl.full([NODES], float("inf"), tl.float32)
    inside_id, rest_id = tl.full([NODES], NO_ID, tl.int32), tl.full([NODES], NO_ID, tl.int32)
    p_t = tl.zeros([NODES], tl.float32)
    if matching:
        taken = fresh & (t == tl.gather(tl.where(bad, -1, token), up, 0))
    elif fixed:
        p_t = tl.where(fresh, mass_of(x_t, tl.gather(top, up, 0), c), 0.0).to(tl.float32)
        onward = offer_fixed(p_t, norm, offered, first, most, NODES)
        taken = node == tl.gather(onward, up, 0)
    elif SPARSE:
        p = mass_of(x, top[:, None], c)
        onward, r = offer_drawn(p, w, norm, when, u, share, drawn, NODES, WIDTH, AHEAD)
        taken = node == tl.gather(onward, up, 0)
        r, p = r.to(tl.float32), p.to(tl.float32)
        left = tl.sum(tl.where(ids >= 0, r, 0.0), 1)
        # NaN: a draft law without sense takes nothing.
        r = tl.where((left == left)[:, None], r, p)
        if not AHEAD:
            ids = some_from_l2(q_ids_ptr + at, listed, -1)
            ids = tl.where((ids >= 0) & (ids < vocab), ids, -1)
            noise = noise_of(ids, (position + depth + 1)[:, None], base, seed)
        inside_key, inside_id = weigh(ids, r, noise, 1)
        _, rest_id = weigh(ids, p, noise, 1)
    else:
        taken = node < 0

    # Walked is who and whose every ancestor stands.
    stood = bits_of(taken & known, node, NODES)
    walked = live & ((way & stood) == way)
    # The furthest, as a node stands behind its parent: number, depth and state in one maximum.
    furthest = tl.max(tl.where(walked, node * 256 + depth * 2 + dead, 0), 0)
    last, m, failed = furthest >> 8, (furthest >> 1) & 127, (furthest & 1) != 0
    nothing = failed | (number == 0)
    end = node == last
    if matching == 0:
        if fixed:  # its children, of which nothing is left
            theirs = tl.where((parent == last) & known, t, -1)
            _, rest = weigh(theirs, p_t, noise_t, 0)
            rest_id = tl.where(end, rest, rest_id)
            if not FOLD:
                tl.store(excluded_ptr + b * count + node, theirs, mask=node < nodes)
        elif SPARSE and not FOLD:
            listed_ptr = excluded_ptr + b * count + node[:, None] * 0 + col[None, :]
            tl.store(listed_ptr, ids, mask=end[:, None] & (col < K)[None, :])
        if FOLD:
            token = pick(key, token, 1.0, inside_key, inside_id, rest_id)
        else:
            lane, used = tl.arange(0, COUNT), tl.where(fixed, nodes, K)
            tl.store(excluded_ptr + b * count + lane, -1, mask=(lane >= used) & (lane < count))
            stop = stop_ptr + b * STOP
            tl.store(stop + PLACE, m)
            tl.store(stop + DEPTH, m)
            tl.store(stop + SCALE, 0x3F800000)
            key_m = at_level(inside_key, node, last)
            tl.store(stop + INSIDE_KEY, key_m.to(tl.int32, bitcast=True))
            tl.store(stop + INSIDE_ID, tl.sum(tl.where(end, inside_id, 0), 0))
            tl.store(stop + REST_ID, tl.sum(tl.where(end, rest_id, 0), 0))
    if not FOLD:  # the race writes the token, unless there is nothing to race for
        tl.store(stop_ptr + b * STOP + ROW, tl.where(matching | nothing, -1, last))

    at = b * nodes + node
    walked, behind = walked & (nothing == 0), (node < nodes) & ((node > m) | nothing)
    tl.store(path_ptr + b * nodes + depth, node, mask=walked)
    tl.store(path_ptr + at, -1, mask=behind)
    tl.store(token_ids_ptr + b * nodes + depth - 1, t, mask=walked & (node > 0))
    tl.store(token_ids_ptr + b * nodes + depth, token, mask=walked & end)
    tl.store(token_ids_ptr + at, -1, mask=behind)
    tl.store(accepted_ptr + b, tl.where(nothing, 0, m))
    tl.store(status_ptr + b, failed.to(tl.int32))


def _warps(tile: int) -> int:
    """Eight beat four, two and one at 32 nodes, batch 1 (H200)."""
    return 1 if tile <= 512 else 8


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
    records = None if fold else rows.new_records(partial)
    rows.statistics(
        logits, number, law, temperature, seed, position, base, partial, bonus=0, cutoff=cutoff,
        parent=parent, fold=fold, child_ids=node_ids, q_ids=q_ids, records=records,
    )  # fmt: skip
    splits, count = partial.shape[3], max(k, nodes)
    stop = excluded = None
    if not fold:
        stop, excluded = number.new_empty(batch, STOP.value), number.new_empty(batch, count)
    width, across, listed = (triton.next_power_of_2(x) for x in (nodes, splits, k))
    _walk_kernel[(batch,)](
        logits, logits.stride(0), logits.stride(1), node_ids, parent, number, q_ids, q_probs, law,
        temperature, cutoff, seed, position, base, partial, stop, excluded, accepted, path,
        token_ids, status, nodes, vocab, splits, count, K=k, NODES=width, SPLITS=across,
        WIDTH=listed, COUNT=triton.next_power_of_2(count), FOLD=fold,
        num_warps=_warps(width * max(width, across, listed)),
        **overlap(logits),
    )  # fmt: skip
    if stop is not None and excluded is not None and records is not None:
        rows.race(
            logits, temperature, seed, position, base, partial, stop, excluded, records, token_ids,
            cutoff=cutoff,
        )  # fmt: skip
    return accepted, path, token_ids, status
