"""Device functions over the nodes of a tree, vectors `[NODES]` and tiles of them: for its walk."""

import triton
import triton.language as tl

from eesd_kernels.triton.levels import above_zero
from eesd_kernels.triton.random import words_of_ids
from eesd_kernels.triton.splits import NO_ID, TARGET, key_of, winner


@triton.jit
def lineage(parent, t, node, NODES: tl.constexpr):
    """Of each node its depth, first child, number among its siblings, next sibling, and freshness.

    parent: -1 for none, else below the node. Where there is no child or sibling: NODES. A node is
    fresh unless a sibling before it has its token.
    """
    depth, up = (parent >= 0).to(tl.int32), parent
    while tl.max(up, 0) > 0:
        up = tl.where(up > 0, tl.gather(parent, tl.maximum(up, 0), 0), -1)
        depth += (up >= 0).to(tl.int32)
    other = node[None, :]
    first = tl.min(tl.where(parent[None, :] == node[:, None], other, NODES), 1)
    same = (parent[None, :] == parent[:, None]) & (parent >= 0)[:, None]
    following = tl.min(tl.where(same & (other > node[:, None]), other, NODES), 1)
    same = same & (other < node[:, None])
    sibling = tl.sum(same.to(tl.int32), 1)
    fresh = tl.max((same & (t[None, :] == t[:, None])).to(tl.int32), 1) == 0
    return depth, first, sibling, following, fresh


@triton.jit
def pack(word, place, following):
    """What the test of a child needs of it in one number: its uniform's bits, and two below 128."""
    return (word >> 8).to(tl.int64) | (place << 24).to(tl.int64) | (following.to(tl.int64) << 32)


@triton.jit
def uniform_of(facts):
    """`accept_uniform`, float64."""
    return (facts.to(tl.int32) & 0xFFFFFF).to(tl.float64) * (1.0 / (1 << 24))


@triton.jit
def offer_fixed(p_t, s, offered, first, most, NODES: tl.constexpr):
    """Each node's first child that stands, or NODES, where children are not drawn.

    p_t: of the nodes in their parents' rows, float32; -1: offered in vain. s: the rows'
    normalisers. offered: of `pack`. most: children of a node at most.
    """
    child, onward = first, tl.full([NODES], NODES, tl.int32)
    for _ in range(most):
        there, here = child < NODES, tl.minimum(child, NODES - 1)
        facts = tl.gather(offered, here, 0)
        r = tl.where(there & (onward == NODES), tl.gather(p_t, here, 0), -1.0).to(tl.float64)
        stands = uniform_of(facts) * s < r
        s = tl.where(r > 0, above_zero(s - r), s)
        onward = tl.where(stands, child, onward)
        child = tl.where(there, (facts >> 32).to(tl.int32), NODES)
    return onward


@triton.jit
def offer_drawn(
    r, w, norm, offered, first, most, NODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same of children drawn without replacement, and what they leave of r.

    r, w: of p and of the laws on the laws' ids `[NODES, WIDTH]`.
    """
    col = tl.arange(0, WIDTH)[None, :]
    outside = above_zero(norm - tl.sum(r, 1))
    w_all = tl.sum(w.to(tl.float64), 1)
    child, onward = first, tl.full([NODES], NODES, tl.int32)
    for _ in range(most):
        there, here = child < NODES, tl.minimum(child, NODES - 1)
        facts = tl.gather(offered, here, 0)
        place = (facts >> 24).to(tl.int32) & 127
        drawn = there & (onward == NODES) & (place < WIDTH) & (w_all != 0)
        at_place = (col == place[:, None]) & drawn[:, None]
        s = tl.sum(r, 1) + outside
        w_c = tl.sum(tl.where(at_place, w, 0.0), 1).to(tl.float64)
        r_c = tl.sum(tl.where(at_place, r, 0.0), 1)
        stands = drawn & (uniform_of(facts) * w_c * s < r_c * w_all)
        fell = (drawn & (stands == 0))[:, None]
        less = above_zero(r - (s / w_all)[:, None] * w.to(tl.float64))
        r = tl.where(fell, tl.where(at_place, 0.0, less), r)
        w = tl.where(at_place & fell, 0.0, w)
        w_all = tl.sum(w.to(tl.float64), 1)
        onward = tl.where(stands, child, onward)
        child = tl.where(there, (facts >> 32).to(tl.int32), NODES)
    return onward, r


@triton.jit
def weigh(ids, r, p, place, base, seed):
    """The best key of an id by what is left of p, its id, and the winner by p itself."""
    word = words_of_ids(tl.where(ids >= 0, ids, 0), place, base, TARGET, seed)
    listed = tl.where(ids >= 0, ids, NO_ID)
    key, who = winner(key_of(word, tl.where(ids >= 0, r, 0.0)), listed, 0)
    _, rest = winner(key_of(word, tl.where(ids >= 0, p, 0.0)), listed, 0)
    return key, who, rest
