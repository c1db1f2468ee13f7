"""Device functions over the nodes of a tree, vectors `[NODES]` and tiles of them: for its walk.

What depends on the tree, the draft laws and the noise alone is worked out by `lineage` and `turns`
while the statistics still run; a walk's time is what is left for after them.
"""

import triton
import triton.language as tl

from eesd_kernels.triton.levels import above_zero
from eesd_kernels.triton.random import race_noise, words_of_ids
from eesd_kernels.triton.splits import NO_ID, TARGET, winner


@triton.jit
def lineage(parent, t, node, NODES: tl.constexpr):
    """Of each node its depth, way, first child, elders, next sibling, and freshness.

    parent: -1 for none, else below the node. way: itself and the nodes above it but for the root,
    as bits. elders: a tile, its siblings before it. Where there is no child or sibling: NODES. A
    node is fresh unless an elder has its token.
    """
    depth, up = (parent >= 0).to(tl.int32), parent
    way = tl.where(node > 0, tl.full([NODES], 1, tl.int64) << node, 0)
    while tl.max(up, 0) > 0:
        way |= tl.where(up > 0, tl.full([NODES], 1, tl.int64) << tl.maximum(up, 0), 0)
        up = tl.where(up > 0, tl.gather(parent, tl.maximum(up, 0), 0), -1)
        depth += (up >= 0).to(tl.int32)
    other = node[None, :]
    first = tl.min(tl.where(parent[None, :] == node[:, None], other, NODES), 1)
    same = (parent[None, :] == parent[:, None]) & (parent >= 0)[:, None]
    following = tl.min(tl.where(same & (other > node[:, None]), other, NODES), 1)
    elders = same & (other < node[:, None])
    fresh = tl.max((elders & (t[None, :] == t[:, None])).to(tl.int32), 1) == 0
    return depth, way, first, elders, following, fresh


@triton.jit
def bits_of(chosen, node, NODES: tl.constexpr):
    """The chosen nodes as bits of an int64: a sum of int32 is one instruction of a warp."""
    bit = tl.where(chosen, 1 << (node & 31), 0)
    bits = tl.sum(tl.where(node < 32, bit, 0), 0).to(tl.int64) & 0xFFFFFFFF
    if NODES > 32:
        bits |= tl.sum(tl.where(node < 32, 0, bit), 0).to(tl.int64) << 32
    return bits


@triton.jit
def pack(word, place, following):
    """What the test of a child needs of it in one number: its uniform's bits, place and sibling."""
    return (word >> 8).to(tl.int64) | (place.to(tl.int64) << 24) | (following.to(tl.int64) << 40)


@triton.jit
def place_of(facts):
    return (facts >> 24).to(tl.int32) & 0xFFFF


@triton.jit
def following_of(facts):
    return (facts >> 40).to(tl.int32)


@triton.jit
def uniform_of(facts):
    """`accept_uniform`, float32: exact."""
    return (facts.to(tl.int32) & 0xFFFFFF).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def offer_fixed(p_t, s, offered, first, most, NODES: tl.constexpr):
    """Each node's first child that stands, or NODES, where children are not drawn.

    p_t: of the nodes in their parents' rows, float32; 0: offered in vain. s: the rows' normalisers.
    offered: of `pack`. most: children of a node at most.
    """
    child, onward = first, tl.full([NODES], NODES, tl.int32)
    for _ in range(most):
        there, here = child < NODES, tl.minimum(child, NODES - 1)
        facts = tl.gather(offered, here, 0)
        r = tl.where(there & (onward == NODES), tl.gather(p_t, here, 0), 0.0).to(tl.float64)
        stands = uniform_of(facts).to(tl.float64) * s < r
        s = tl.where(r > 0, above_zero(s - r), s)
        onward = tl.where(stands, child, onward)
        child = tl.where(there, following_of(facts), NODES)
    return onward


@triton.jit
def turns(
    w, offered, first, most, NODES: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Who is offered when, where children are drawn without replacement: tiles `[NODES, WIDTH]`.

    Passed over are those that their law cannot have drawn: they take no turn. All the others are
    offered here, as if each were rejected, which changes nothing for those before it.

    w: the laws' weights. offered: of `pack`. most: children of a node at most.

    Returns, of the id in each column, its turn and child in one number, WIDTH turns: never; and its
    uniform; in the column of each turn 1 / (the weight left then), 0: no turn; and turns at most.
    """
    col = tl.arange(0, WIDTH)[None, :]
    when = tl.full([NODES, WIDTH], WIDTH * 128 + 127, tl.int32)
    u = tl.zeros([NODES, WIDTH], tl.float32)
    share = tl.zeros([NODES, WIDTH], tl.float64)
    child, turn = first, tl.zeros([NODES], tl.int32)
    for _ in range(most):
        there, here = child < NODES, tl.minimum(child, NODES - 1)
        facts = tl.gather(offered, here, 0)
        place = place_of(facts)
        w_all = tl.sum(w.to(tl.float64), 1)
        drawn = there & (place < WIDTH) & (w_all != 0)
        at_place = (col == place[:, None]) & drawn[:, None]
        when = tl.where(at_place, (turn * 128 + child)[:, None], when)
        u = tl.where(at_place, uniform_of(facts)[:, None], u)
        if AHEAD:
            now = (col == turn[:, None]) & drawn[:, None]
            share = tl.where(now, (1.0 / w_all)[:, None], share)
        w = tl.where(at_place, 0.0, w)
        turn += drawn.to(tl.int32)
        child = tl.where(there, following_of(facts), NODES)
    return when, u, share, tl.max(turn, 0)


@triton.jit
def offer_drawn(
    r, w, norm, when, u, share, most, NODES: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Each node's first child that stands, or 127, and what its children leave of r if none does.

    r, w: of p and of the laws on the laws' ids. when, u, share, most: of `turns`.
    """
    col = tl.arange(0, WIDTH)[None, :]
    outside = above_zero(norm - tl.sum(r, 1))
    stood = tl.full([NODES, WIDTH], WIDTH * 128 + 127, tl.int32)
    for turn in range(most):
        s = tl.sum(r, 1) + outside
        mine = (when >> 7) == turn
        if AHEAD:
            s *= tl.sum(tl.where(col == turn, share, 0.0), 1)
        else:
            offers = tl.max(mine.to(tl.int32), 1) > 0
            s = tl.where(offers, s / tl.sum(w.to(tl.float64), 1), 0.0)
        taken = s[:, None] * w.to(tl.float64)
        if AHEAD:
            stands = mine & (u.to(tl.float64) * taken < r)
        else:  # a conversion that stays in the loop: tiles of float64 would spill
            stands = tl.where(mine, u, float("nan")).to(tl.float64) * taken < r
        stood = tl.where(stands, when, stood)
        r = tl.where(mine, 0.0, above_zero(r - taken))
        if not AHEAD:
            w = tl.where(mine, 0.0, w)
    return tl.min(stood, 1) & 127, r


@triton.jit
def noise_of(ids, place, base, seed):
    """The race's noise of ids at a place; below 0: any."""
    return race_noise(words_of_ids(tl.where(ids >= 0, ids, 0), place, base, TARGET, seed))


@triton.jit
def weigh(ids, mass, noise, axis: tl.constexpr):
    """The best key of an id by a mass, and its id: +inf where none has mass. Ids below 0: none."""
    key = tl.where((ids >= 0) & (mass > 0), noise / mass, float("inf"))
    return winner(key, tl.where(ids >= 0, ids, NO_ID), axis)
