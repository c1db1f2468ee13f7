"""tree_attention: masks against composed PyTorch, pages, the sliding window, rollback."""

from typing import Any

import pytest
import torch

import eesd_kernels as ek

# float32 sums of up to 40 terms in another order.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
PARENT = [-1, 0, 0, 1, 1, 2, 4]
HEADS, KV_HEADS, SIZE = 6, 2, 8


def i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ancestors(node: int) -> list[int]:
    """From the root down to the node itself."""
    return [] if node < 0 else [*ancestors(PARENT[node]), node]


ANCESTRY = torch.tensor([[sum(1 << j for j in ancestors(i)) for i in range(7)]])


def block(batch: int = 3, slots: int = 40, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "q": torch.randn(batch, 7, HEADS, SIZE),
        "k_cache": torch.randn(batch, slots, KV_HEADS, SIZE),
        "v_cache": torch.randn(batch, slots, KV_HEADS, SIZE),
        "lengths": i32([0, 11, 33])[:batch],
        "num_rows": i32([7, 7, 5])[:batch],
    }


def composed(arguments: dict[str, Any], *, tree: bool, window: int | None = None) -> torch.Tensor:
    """Each row by itself: softmax over the slots that it names, in order of position."""
    q, k, v = (arguments[name] for name in ("q", "k_cache", "v_cache"))
    out = torch.zeros_like(q)
    for b in range(len(q)):
        c = int(arguments["lengths"][b])
        for i in range(int(arguments["num_rows"][b])):
            own = ancestors(i) if tree else list(range(i + 1))
            seen = [*range(c), *(c + j for j in own)]  # the last `window` in order of position
            seen = seen[-window:] if window else seen
            keys = k[b, seen].repeat_interleave(HEADS // KV_HEADS, 1)
            values = v[b, seen].repeat_interleave(HEADS // KV_HEADS, 1)
            p = (torch.einsum("hd,shd->hs", q[b, i], keys) * SIZE**-0.5).softmax(-1)
            out[b, i] = torch.einsum("hs,shd->hd", p, values)
    return out


def paged(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    k, v = arguments["k_cache"], arguments["v_cache"]
    count = -(-k.shape[1] // size)
    order = torch.randperm(len(k) * count + 2)[: len(k) * count].view(len(k), count)
    new = {"block_table": order.to(torch.int32)}
    for name, cache in (("k_cache", k), ("v_cache", v)):
        new[name] = torch.full((len(k) * count + 2, size, *cache.shape[2:]), torch.nan)
        for b in range(len(k)):
            for s in range(cache.shape[1]):
                new[name][order[b, s // size], s % size] = cache[b, s]
    return {**arguments, **new}


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 30, 1000])
def test_equals_composed_pytorch(tree: bool, window: int | None):
    arguments = block()
    changes = {"ancestry": ANCESTRY.repeat(3, 1) if tree else None, "window": window}
    got = ek.tree_attention(**arguments, **changes)
    torch.testing.assert_close(got, composed(arguments, tree=tree, window=window), **TOLERANCE)


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_pages_equal_the_contiguous_cache(tree: bool, size: int):
    arguments = block(seed=size)
    changes = {"ancestry": ANCESTRY.repeat(3, 1) if tree else None}
    want = ek.tree_attention(**arguments, **changes)
    torch.testing.assert_close(
        ek.tree_attention(**paged(arguments, size), **changes), want, **TOLERANCE
    )
    want = ek.tree_attention(**arguments, **changes, window=6)
    got = ek.tree_attention(**paged(arguments, size), **changes, window=6)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_a_path_seen_as_a_tree_is_seen_the_same_after_rollback():
    """Node 6's ancestors, and then the same rows as a line behind the moved slots."""
    arguments = block(batch=1)
    path = [0, 1, 4, 6]
    before = ek.tree_attention(**arguments, ancestry=ANCESTRY)[:, path]
    cache = torch.stack((arguments["k_cache"], arguments["v_cache"]))[None]
    ek.rollback_kv(cache, i32([[*path, -1, -1, -1]]), arguments["lengths"])
    after = ek.tree_attention(
        arguments["q"][:, path], cache[0, 0], cache[0, 1], arguments["lengths"], i32([4])
    )
    torch.testing.assert_close(after, before, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype):
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in block().items()}
    got = ek.tree_attention(**arguments)
    assert got.dtype is dtype
    inner = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    # One rounding of the result: half a unit in the last place of numbers up to 2.
    atol = {torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got.double(), composed(inner, tree=False), atol=atol, rtol=0)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_opcheck_of_each_form(page: int | None, window: int | None):
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    arguments = block() if page is None else paged(block(), page)
    arguments |= {"scale": 0.3, "ancestry": ANCESTRY.repeat(3, 1), "window": window}
    op = torch.ops.eesd.tree_attention.default
    torch.library.opcheck(op, [arguments.get(a.name) for a in op._schema.arguments])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: expected 1 to 2147483647, got 0"),
        ({"window": 2.0}, "window: expected an integer, got 2.0"),
        ({"block_table": i32([[0, 1], [2, 12], [0, 0]])}, "block_table: expected pages from 0 to"),
        ({"block_table": i32([[0], [1], [2]])}, "block_table: expected pages from 0 to 11"),
        ({"block_table": i32([0, 1, 2])}, r"block_table: expected shape \[B, max_pages\]"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str):
    arguments = block()
    if "block_table" in changes:
        pages = torch.zeros(12, 16, KV_HEADS, SIZE)
        arguments |= {"k_cache": pages, "v_cache": pages}
    with pytest.raises((ValueError, TypeError), match=f"tree_attention: {message}"):
        ek.tree_attention(**arguments, **changes)
