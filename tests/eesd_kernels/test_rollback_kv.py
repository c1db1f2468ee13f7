"""rollback_kv: every byte of the cache, contiguous and paged, and lengths."""

from typing import Any

import pytest
import torch
from pages import pages_of, unpaged

import eesd_kernels as ek
from eesd_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYERS, SLOTS = 3, 23


def i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PATHS = {
    "a line moves nothing": [0, 1, 2, 3, -1, -1],
    "the root alone": [0, -1, -1, -1, -1, -1],
    "no path": [-1] * 6,
    "the last node": [0, 5, -1, -1, -1, -1],
    "overlap": [0, 2, 3, 4, 5, -1],
    "all": [0, 1, 2, 3, 4, 5],
    "gaps": [0, 1, 3, 5, -1, -1],
}


def expected(sequence: torch.Tensor, path: list[int], c: int) -> torch.Tensor:
    """By hand, one slot after the other from a copy: `[.., S, ..]` of one sequence."""
    out = sequence.clone()
    for depth, node in enumerate(x for x in path if x >= 0):
        out[:, :, c + depth] = sequence[:, :, c + node]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous(dtype: torch.dtype):
    torch.manual_seed(1)
    path = i32(list(PATHS.values()))
    lengths = i32([0, 5, 11, 17, 3, 0, 12])
    cache = torch.randn(LAYERS, 2, len(path), SLOTS, 2, 5).to(dtype)
    want = [expected(cache[:, :, b], path[b].tolist(), int(lengths[b])) for b in range(len(path))]
    new = ek.rollback_kv(cache, path, lengths)
    assert torch.equal(cache, torch.stack(want, 2))
    assert new.tolist() == [4, 6, 11, 19, 8, 6, 16]
    assert new.dtype is torch.int32
    assert lengths.tolist() == [0, 5, 11, 17, 3, 0, 12]


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_paged_equals_contiguous_and_touches_no_other_page(size: int):
    torch.manual_seed(size)
    path, lengths = i32(list(PATHS.values())), i32([0, 5, 11, 17, 3, 0, 12])
    cache = torch.randn(LAYERS, 2, len(path), SLOTS, 2, 5)
    pages, table = pages_of(cache, size)
    before = pages.clone()
    new = ek.rollback_kv(cache, path, lengths)
    assert torch.equal(ek.rollback_kv(pages, path, lengths, block_table=table), new)
    assert torch.equal(unpaged(pages, table, SLOTS), cache)
    changed = (pages != before).flatten(4).any(-1).any(0).any(0)
    mine = torch.zeros_like(changed)
    for b in range(len(path)):
        for slot in range(int(lengths[b]) + 1, int(new[b])):
            mine[table[b, slot // size], slot % size] = True
    assert not (changed & ~mine).any()


def test_unused_pages_may_be_missing_from_the_table():
    torch.manual_seed(2)
    pages = torch.randn(1, 2, 4, 4, 1, 2)
    before = pages.clone()
    table = i32([[-1, 2, 0, -1], [-1, -1, -1, -1]])
    path = i32([[0, 2, 3], [-1, -1, -1]])
    new = ek.rollback_kv(pages, path, i32([5, 40]), block_table=table)
    assert new.tolist() == [8, 40]
    assert torch.equal(pages[:, :, 2, 2:], torch.stack((before[:, :, 2, 3], before[:, :, 0, 0]), 2))


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (3, 0)], ids=str)
def test_nothing_to_move(shape: tuple[int, int]):
    batch, nodes = shape
    cache = torch.randn(2, 2, batch, 6, 1, 2)
    before = cache.clone()
    path = torch.zeros(batch, nodes, dtype=torch.int32)
    new = ek.rollback_kv(cache, path, torch.full((batch,), 2, dtype=torch.int32))
    assert torch.equal(cache, before)
    assert new.tolist() == [2 + nodes] * batch


def test_a_view_of_a_larger_cache():
    """Strides are the tensor's own: one sequence's part, in place."""
    torch.manual_seed(3)
    whole = torch.randn(2, 2, 5, 9, 1, 3)
    before = whole.clone()
    ek.rollback_kv(whole[:, :, 1:2], i32([[0, 2, 4]]), i32([1]))
    assert torch.equal(whole[:, :, 1], expected(before[:, :, 1], [0, 2, 4], 1))
    rest = [0, 2, 3, 4]
    assert torch.equal(whole[:, :, rest], before[:, :, rest])


def test_a_move_one_by_one_in_place_would_show():
    """The twin: where slots overlap, an unstaged move against the grain loses a node."""
    cache = torch.arange(6.0).view(1, 1, 1, 6, 1, 1).repeat(1, 2, 1, 1, 1, 1)
    unstaged = cache.clone()
    for depth, node in reversed(list(enumerate([0, 2, 3]))):
        unstaged[:, :, :, 1 + depth] = unstaged[:, :, :, 1 + node]
    ek.rollback_kv(cache, i32([[0, 2, 3]]), i32([1]))
    assert cache[0, 0, 0, :, 0, 0].tolist() == [0, 1, 3, 4, 4, 5]
    assert not torch.equal(cache, unstaged)


def test_opcheck_of_a_paged_cache():
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    pages, table = pages_of(torch.randn(2, 2, 2, 9, 1, 3), 4)
    path, lengths = i32([[0, 2, 4], [0, 1, -1]]), i32([1, 3])
    torch.library.opcheck(torch.ops.eesd.rollback_kv.default, (pages, path, lengths, table))
    mine, theirs = pages.clone(), pages.clone()
    new = ek.rollback_kv(mine, path, lengths, block_table=table)
    assert torch.equal(new, reference.rollback_kv(theirs, path, lengths, table))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": i32([[1, 2, 3]])}, "path: expected 0, rising node indices, then -1"),
        ({"path": i32([[0, 2, 2]])}, "path: expected 0, rising node indices, then -1"),
        ({"path": i32([[0, -1, 2]])}, "path: expected 0, rising node indices, then -1"),
        ({"path": i32([[-2, -1, -1]])}, "path: expected 0, rising node indices, then -1"),
        ({"lengths": i32([-1])}, "lengths: expected every node's slot from 0 to 8"),
        ({"lengths": i32([6])}, "lengths: expected every node's slot from 0 to 8"),
        (
            {"cache": torch.zeros(2, 2, 4, 3, 1, 2), "block_table": i32([[0, 4, 1]])},
            "block_table: expected pages from 0 to 3",
        ),
        (
            {"cache": torch.zeros(2, 2, 4, 3, 1, 2), "block_table": i32([[0, -1, 1]])},
            "block_table: expected pages from 0 to 3",
        ),
        (
            {"cache": torch.zeros(2, 2, 4, 3, 1, 2), "block_table": i32([[0]])},
            "lengths: expected every node's slot from 0 to 2",
        ),
        ({"cache": torch.zeros(2, 3, 1, 9, 1, 2)}, r"cache: expected shape \[layers, 2, B, S, H"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str):
    good = {
        "cache": torch.zeros(2, 2, 1, 9, 1, 2),
        "path": i32([[0, 2, 3]]),
        "lengths": i32([2]),
    }
    with pytest.raises(ValueError, match=f"rollback_kv: {message}"):
        ek.rollback_kv(**{**good, **changes})
