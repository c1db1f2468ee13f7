"""rollback_kv's kernel: every byte of the cache as the reference leaves it, and the lengths."""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from pages import pages_of, random_path
from torch import Tensor

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton import rollback_kv as kernels
from eesd_kernels.triton.rollback_kv import Tiling, rollback_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Small tilings make many groups, slices and long runs of planes out of small caches.
TILINGS = {
    "few": ("FEW", kernels.FEW), "many": ("MANY", kernels.MANY),
    "small": ("MANY", Tiling(16, 2, 2, 1)), "one by one": ("MANY", Tiling(8, 1, 1, 1)),
}  # fmt: skip


class Case(NamedTuple):
    """The op's arguments."""

    cache: Tensor
    path: Tensor
    lengths: Tensor
    table: Tensor | None


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bits(x: Tensor) -> Tensor:
    """As integers: NaNs are equal to themselves, and 0 is not -0."""
    return x.contiguous().view(BITS[x.element_size()])


def random_bytes(*shape: int, dtype: torch.dtype) -> Tensor:
    """Of any kind of number, NaNs with a payload among them."""
    shape = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).view(dtype)


def case(
    paths: list[list[int]],
    form: str,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    heads: int = 3,
    size: int = 5,
    slots: int = 40,
    seed: int = 0,
) -> Case:
    """form: "contiguous", "pages of <n>", or either with " heads first": the heads before slots."""
    torch.manual_seed(seed)
    room = slots - max(1 + max(path) for path in paths)
    lengths = torch.randint(0, room + 1, (len(paths),), dtype=torch.int32)
    lengths[0] = room  # the last slot is in use
    cache = random_bytes(layers, 2, len(paths), slots, heads, size, dtype=dtype)
    table = None
    if "pages" in form:
        cache, table = pages_of(cache, int(form.split()[2]))
    if "heads first" in form:
        cache = cache.transpose(3, 4).contiguous().transpose(3, 4)
    return Case(cache, i32(paths), lengths.to(DEVICE), table)


def check(given: Case, run: Callable[..., Tensor] = rollback_kv) -> None:
    """Bytes and lengths; the arguments beside the cache stay as they are."""
    mine, theirs = given.cache, given.cache.clone()
    path, lengths = given.path.clone(), given.lengths.clone()
    # Over integers: on a GPU a copy of bfloat16 may lose a NaN's payload.
    as_bits = theirs.view(BITS[theirs.element_size()])
    want = reference.rollback_kv(as_bits, given.path, given.lengths, given.table)
    out = torch.full_like(given.lengths, 77)
    got = run(mine, given.path, given.lengths, given.table, out=(out,))
    assert got is out
    assert torch.equal(out, want)
    assert torch.equal(bits(mine), bits(theirs))
    assert torch.equal(given.path, path)
    assert torch.equal(given.lengths, lengths)


def deal(monkeypatch: pytest.MonkeyPatch, name: str, tiling: Tiling) -> None:
    """Every launch by this tiling; by that for large batches in as few programs as can be."""
    monkeypatch.setattr(kernels, name, tiling)
    monkeypatch.setattr(kernels, "FEW_BELOW", 0 if name == "MANY" else 1 << 30)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)


def trees(count: int, nodes: int, seed: int = 0) -> list[list[int]]:
    """Paths, the first of which moves all but the root."""
    rng = random.Random(seed)
    first = [0, *range(2, nodes), -1]
    return [first, *(random_path(nodes, rng) for _ in range(count - 1))]


FORMS = [
    f"{pages}{heads}"
    for pages in ("contiguous", "pages of 1", "pages of 3", "pages of 16")
    for heads in ("", " heads first")
]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("form", FORMS)
def test_random_trees(form: str, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deal(monkeypatch, *TILINGS[tiling])
    few = tiling == "one by one"
    given = case(trees(2 if few else 6, 9, seed=len(form)), form, layers=1 if few else 2)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(dtype: torch.dtype) -> None:
    check(case(trees(5, 7), "contiguous", dtype, heads=2, size=4))
    check(case(trees(5, 7), "pages of 4", dtype, heads=1, size=1))


OVERLAPS = {
    "one up": [0, *range(2, 13), -1],
    "two up": [0, *range(3, 13), -1, -1],
    "a line and then one up": [0, 1, 2, 3, 4, *range(6, 13), -1],
    "gaps": [0, 1, 3, 4, 7, 8, 9, 12, -1, -1, -1, -1, -1],
    "far": [0, 12, *[-1] * 11],
}


@pytest.mark.parametrize(("group", "planes"), [(1, 1), (2, 1), (8, 1), (2, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize("form", ["contiguous", "pages of 3"])
@pytest.mark.parametrize("path", OVERLAPS.values(), ids=OVERLAPS)
def test_overlaps(
    path: list[int], form: str, group: int, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of one plane one after the other, and groups that hold the end of one and the next."""
    deal(monkeypatch, "MANY", Tiling(2048, group, planes, 1))
    check(case([path], form, heads=1, size=3))


def test_staging_is_needed() -> None:
    """The twin: stored before the group's later tokens are loaded, a node would be lost."""
    cache = torch.arange(6.0, device=DEVICE).view(1, 1, 1, 6, 1, 1).repeat(1, 2, 1, 1, 1, 1)
    new = rollback_kv(cache, i32([[0, 2, 3]]), i32([1]))
    assert cache[0, 1, 0, :, 0, 0].tolist() == [0, 1, 3, 4, 4, 5]
    assert new.tolist() == [4]


@pytest.mark.parametrize(("batch", "nodes"), [(0, 4), (3, 0), (2, 1)])
@pytest.mark.parametrize("form", ["contiguous", "pages of 4"])
def test_nothing_to_move(batch: int, nodes: int, form: str) -> None:
    cache, table = random_bytes(2, 2, batch, 6, 1, 2, dtype=torch.float32), None
    if form != "contiguous":
        cache, table = pages_of(cache, 4)
    path = torch.zeros(batch, nodes, dtype=torch.int32, device=DEVICE)
    check(Case(cache, path, torch.full_like(path.sum(1).int(), 2), table))


def test_an_empty_cache_has_lengths_too() -> None:
    for shape in ((0, 2, 1, 6, 1, 2), (1, 2, 1, 6, 0, 2), (1, 2, 1, 6, 1, 0)):
        check(Case(torch.zeros(shape, device=DEVICE), i32([[0, 2, -1]]), i32([1]), None))


def test_strided_arguments() -> None:
    """One sequence's part of a larger cache, and a path and lengths that are views."""
    whole = random_bytes(2, 2, 5, 20, 2, 6, dtype=torch.bfloat16)
    before = whole.clone()
    path = i32([[0, 9, 1, 9, 4, 9, 6, 9]] * 4)[1:3, ::2]
    check(Case(whole[:, :, 1:3, 2:, :, 1:4], path, i32([5, 7, 9, 7])[::2], None))
    assert not torch.equal(bits(whole), bits(before))
    whole[:, :, 1:3, 2:, :, 1:4] = before[:, :, 1:3, 2:, :, 1:4]
    assert torch.equal(bits(whole), bits(before))


@pytest.mark.parametrize("form", ["contiguous", "pages of 4"])
def test_what_lies_outside_is_left_alone(form: str) -> None:
    """Slots beyond the end and before the start, pages that are not there: no move, no fault."""
    whole = random_bytes(3, 2, 6, 12, 1, 4, dtype=torch.float32)
    before = whole.clone()
    cache, table = whole[1:2, :, 2:4], None
    if form == "contiguous":
        lengths = i32([10, -3])  # nodes 2 and 4: 12, 14 of 12 slots
    else:  # [1, 2, 24 / 4 pages, ..]
        cache = cache.reshape(1, 2, 6, 4, 1, 4)
        table, lengths = i32([[0, 6, -1], [-1, 1, 2]]), i32([3, 11])
    inside = cache.clone()
    new = rollback_kv(cache, i32([[0, 2, 4], [0, 2, 4]]), lengths, table)
    assert torch.equal(bits(cache), bits(inside))
    assert new.tolist() == [n + 3 for n in lengths.tolist()]
    assert torch.equal(bits(whole), bits(before))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_out_of_the_public_function(device: str) -> None:
    given = Case(*(x if x is None else x.to(device) for x in case(trees(4, 6), "pages of 4")))
    other = given.cache.clone()
    want = ek.rollback_kv(other, given.path, given.lengths, block_table=given.table)
    out = torch.full_like(want, 77)
    arguments = {"block_table": given.table, "out": out}
    assert ek.rollback_kv(given.cache, given.path, given.lengths, **arguments) is out
    assert torch.equal(out, want)
    assert torch.equal(bits(given.cache), bits(other))
    with pytest.raises(ValueError, match="rollback_kv: out: expected another tensor than lengths"):
        ek.rollback_kv(other, given.path, given.lengths, **{**arguments, "out": given.lengths})
    with pytest.raises(ValueError, match=r"rollback_kv: out: expected shape \[B\] with B = 4"):
        ek.rollback_kv(other, given.path, given.lengths, **{**arguments, "out": out[:3]})


REAL = {  # layers, KV heads, batch, nodes, slots
    "7b": (32, 32, 8, 32, 100), "13b": (40, 40, 1, 64, 300), "13b of 64": (40, 40, 64, 16, 40),
    "70b": (80, 8, 64, 64, 100), "3-8b": (32, 8, 100, 7, 50),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["contiguous", "pages of 16", "pages of 16 heads first"])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: str, form: str) -> None:
    layers, heads, batch, nodes, slots = REAL[shape]
    for seed in range(4 if batch == 1 else 1):
        paths = trees(batch, nodes, seed=seed + 2)
        given = case(paths, form, torch.bfloat16, layers, heads, 128, slots, seed)
        check(given, run=_through_the_op)


def _through_the_op(*arguments: Tensor, out: tuple[Tensor]) -> Tensor:
    torch.ops.eesd.rollback_kv.out(*arguments, out0=out[0])
    return out[0]


@pytest.mark.gpu
def test_many_times_the_same_bytes() -> None:
    """A thread that stored before another had loaded would show in some of these."""
    paths = [[0, *range(1 + far, 40 + far)] for far in range(1, 21)]
    given = case(paths, "contiguous", torch.bfloat16, 40, 8, 128, 80)
    start = given.cache.clone()
    check(given)
    want = given.cache.clone()
    for _ in range(100):
        given.cache.copy_(start)
        rollback_kv(*given)
        assert torch.equal(bits(given.cache), bits(want))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["contiguous", "pages of 16"])
def test_graph_replay(form: str) -> None:
    """Paths, lengths and pages are read at replay."""
    first, second = (
        case(trees(16, 32, seed=s), form, torch.bfloat16, 4, 8, 128, 100, s) for s in (1, 2)
    )
    static = Case(*(None if x is None else x.clone() for x in first))
    out = torch.empty_like(static.lengths)
    graph = torch.cuda.CUDAGraph()
    rollback_kv(*static, out=(out,))
    with torch.cuda.graph(graph):
        ek.rollback_kv(static.cache, static.path, static.lengths, block_table=static.table, out=out)
    for given in (first, second, first):
        for mine, theirs in zip(static, given, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        graph.replay()
        theirs = given.cache.clone()
        want = reference.rollback_kv(bits(theirs), *given[1:])
        assert torch.equal(out, want)
        assert torch.equal(bits(static.cache), bits(theirs))
