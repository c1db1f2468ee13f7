"""Philox words through the binding, bit for bit against numpy and Random123's known answers."""

import numpy as np
import pytest

from eesd_kernels import _C
from tests.csrc.philox_numpy import philox, words

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def call(seed, position, base, purpose, n, ids=None, parent=None):
    seed = np.ascontiguousarray(seed, np.int64)
    position, base = (np.ascontiguousarray(a, np.int32) for a in (position, base))
    ids = None if ids is None else np.ascontiguousarray(ids, np.int32)
    parent = None if parent is None else np.ascontiguousarray(parent, np.int32)
    out = np.full((len(seed), n), 0xDEADBEEF, np.uint32)
    _C.philox_words(
        seed.ctypes.data,
        position.ctypes.data,
        base.ctypes.data,
        purpose,
        len(seed),
        n,
        out.ctypes.data,
        ids=0 if ids is None else ids.ctypes.data,
        parent=0 if parent is None else parent.ctypes.data,
    )
    return out


def rows(count):
    rng = np.random.default_rng(count)
    bounds = np.iinfo(np.int64), np.iinfo(np.int32)
    seed = rng.integers(bounds[0].min, bounds[0].max, count)
    position, base = (rng.integers(bounds[1].min, bounds[1].max, count) for _ in range(2))
    return seed, position, base


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(int(w) for w in philox(*key, *counter)) == answer
    seed = np.array([key[0] | key[1] << 32], np.uint64).view(np.int64)
    position, base = (np.array([c], np.uint32).view(np.int32) for c in counter[1:3])
    # Counter word 0 is id div 4 + parent * 2^26, modulo 2^32.
    ids = [[4 * (counter[0] % 2**26) + k for k in range(4)]]
    out = call(seed, position, base, counter[3], 4, ids=ids, parent=[counter[0] >> 26])
    assert tuple(int(w) for w in out[0]) == answer


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 255, 256, 257, 4096, 32_003])
def test_vocabulary_equals_numpy(n):
    seed, position, base = rows(3)
    want = words(seed, position, base, 2 + 256 * 7, np.arange(n))
    np.testing.assert_array_equal(call(seed, position, base, 2 + 256 * 7, n), want)


def test_ids_and_parents_equal_numpy():
    seed, position, base = rows(5)
    ids = np.random.default_rng(0).integers(-1, 151_936, (5, 33))
    parent = np.array([0, 1, 7, 63, 2])
    want = words(seed, position, base, 1, ids, parent)
    np.testing.assert_array_equal(call(seed, position, base, 1, 33, ids, parent), want)
    want = words(seed, position, base, 1, np.arange(33), parent)
    np.testing.assert_array_equal(call(seed, position, base, 1, 33, parent=parent), want)


def test_every_coordinate_changes_the_words():
    one = [[1], [2], [3], 1]
    first = call(*one, 64)
    for axis, other in enumerate(([2], [3], [4], 2)):
        changed = call(*one[:axis], other, *one[axis + 1 :], 64)
        assert (changed == first).mean() < 0.05
    assert (call([1 + 2**32], [2], [3], 1, 64) == first).mean() < 0.05


def test_empty():
    assert call([], [], [], 1, 7).shape == (0, 7)
    assert call([1], [1], [1], 1, 0).shape == (1, 0)


def test_refusals():
    with pytest.raises(ValueError, match="philox_words: a required pointer is null"):
        _C.philox_words(0, 0, 0, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="philox_words: a size is negative"):
        _C.philox_words(0, 0, 0, 1, -1, 1, 0)
