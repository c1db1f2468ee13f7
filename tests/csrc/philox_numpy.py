"""Philox4x32-10 in plain numpy, written from the paper: what the C++ is checked against."""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(key_lo, key_hi, c0, c1, c2, c3):
    """Integer arrays (or scalars) of the six inputs, broadcast; four uint32 arrays."""
    arrays = np.broadcast_arrays(
        *(np.asarray(a, np.int64) for a in (key_lo, key_hi, c0, c1, c2, c3))
    )
    k0, k1, c0, c1, c2, c3 = (a.astype(np.uint64) & MASK for a in arrays)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & MASK, (p0 >> SHIFT) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & MASK, (k1 + np.uint64(0xBB67AE85)) & MASK
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def words(seed, position, base, purpose, ids, parent=0):
    """The word of each id: seed, position, base, parent `[R]`, ids `[n]` or `[R, n]`."""
    seed, position, base = (np.asarray(a, np.int64)[:, None] for a in (seed, position, base))
    ids = np.asarray(ids, np.int64)
    index = ids // 4 + np.broadcast_to(np.asarray(parent, np.int64), seed.shape[0])[:, None] * 2**26
    four = philox(seed & 0xFFFFFFFF, seed >> 32, index, position, base, purpose)
    return np.choose(np.broadcast_to(ids % 4, four[0].shape), four)
