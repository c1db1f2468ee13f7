"""Device functions over the nodes of a tree, vectors `[NODES]` and tiles of them: for its walk."""

import triton
import triton.language as tl

from eesd_kernels.triton.random import words_of_ids
from eesd_kernels.triton.splits import NO_ID, TARGET, key_of, winner


@triton.jit
def chosen_of(values, chosen, none):
    """Of each row of a tile the chosen one of `values`, along the tile's columns; or `none`."""
    return tl.max(tl.where(chosen, values[None, :], none), 1)


@triton.jit
def next_child(parent, node, after, NODES: tl.constexpr):
    """Each node's first child behind `after`, NODES where there is none."""
    theirs = (parent[None, :] == node[:, None]) & (node[None, :] > after[:, None])
    return tl.min(tl.where(theirs, node[None, :], NODES), 1)


@triton.jit
def depths(parent_ptr, parent):
    """Steps from the root; a parent of -1 is none."""
    depth, up = (parent >= 0).to(tl.int32), parent
    while tl.max(up, 0) > 0:
        above = tl.load(parent_ptr + up, mask=up > 0, other=-1)
        up = tl.where(above < up, above, -1)
        depth += (up >= 0).to(tl.int32)
    return depth


@triton.jit
def weigh(ids, r, p, place, base, seed):
    """The best key of an id by what is left of p, its id, and the winner by p itself."""
    word = words_of_ids(tl.where(ids >= 0, ids, 0), place, base, TARGET, seed)
    listed = tl.where(ids >= 0, ids, NO_ID)
    key, who = winner(key_of(word, tl.where(ids >= 0, r, 0.0)), listed, 0)
    _, rest = winner(key_of(word, tl.where(ids >= 0, p, 0.0)), listed, 0)
    return key, who, rest
