"""rope_cache_write: the rotation by complex numbers, slots and pages, what it refuses."""

from typing import Any

import pytest
import torch
from pages import pages_of, unpaged

import eesd_kernels as ek

HEADS, KV_HEADS, SIZE, SLOTS, POSITIONS = 4, 2, 6, 30, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def block(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    angle = torch.rand(POSITIONS, SIZE // 2, dtype=torch.float64) * 6
    table = torch.promote_types(dtype, torch.float32)
    return {
        "qkv": torch.randn(3, 5, (HEADS + 2 * KV_HEADS) * SIZE).to(dtype),
        "cos": angle.cos().to(table),
        "sin": angle.sin().to(table),
        "k_cache": torch.randn(3, SLOTS, KV_HEADS, SIZE).to(dtype),
        "v_cache": torch.randn(3, SLOTS, KV_HEADS, SIZE).to(dtype),
        "lengths": i32([0, 11, 25]),
        "num_rows": i32([3, 0, 5]),
    }


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x `[heads, D]` by the angles of one position, as complex numbers in float64."""
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    pairs = pairs * torch.complex(cos.double(), sin.double())
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turns_by_the_position(dtype: torch.dtype, tree: bool):
    given = block(dtype)
    depth = i32([[0, 1, 1, 2, 3]] * 3)
    before = given["k_cache"].clone(), given["v_cache"].clone()
    q = ek.rope_cache_write(**given, depth=depth if tree else None)
    assert q.dtype is dtype
    atol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    want_k, want_v = before
    for b in range(3):
        for i in range(5):
            if i >= given["num_rows"][b]:
                assert not q[b, i].any()
                continue
            c = int(given["lengths"][b])
            at = c + (int(depth[b, i]) if tree else i)
            row = given["qkv"][b, i].view(-1, SIZE)
            row_q, row_k, row_v = row.split([HEADS, KV_HEADS, KV_HEADS])
            angles = given["cos"][at], given["sin"][at]
            torch.testing.assert_close(q[b, i].double(), turned(row_q, *angles), atol=atol, rtol=0)
            got = given["k_cache"][b, c + i]
            torch.testing.assert_close(got.double(), turned(row_k, *angles), atol=atol, rtol=0)
            want_k[b, c + i], want_v[b, c + i] = got, row_v
    assert torch.equal(given["k_cache"], want_k), "a slot of no row"
    assert torch.equal(given["v_cache"], want_v)


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_pages_equal_the_contiguous_cache_and_no_other_page_changes(size: int, tree: bool):
    given = block(seed=size)
    given["depth"] = i32([[0, 1, 1, 2, 3]] * 3) if tree else None
    k, table = pages_of(given["k_cache"], size)
    v = torch.randn_like(k)
    for b in range(3):
        for s in range(SLOTS):
            v[table[b, s // size], s % size] = given["v_cache"][b, s]
    others = torch.ones(k.shape[:2], dtype=torch.bool)
    for b in range(3):
        for s in range(SLOTS):
            others[table[b, s // size], s % size] = False
    before = k[others].clone(), v[others].clone()
    want = ek.rope_cache_write(**given)
    got = ek.rope_cache_write(**{**given, "k_cache": k, "v_cache": v}, block_table=table)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # C++ against the reference
    torch.testing.assert_close(unpaged(k, table, SLOTS), given["k_cache"], atol=1e-6, rtol=1e-6)
    assert torch.equal(unpaged(v, table, SLOTS), given["v_cache"])
    assert torch.equal(k[others], before[0])
    assert torch.equal(v[others], before[1])


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (3, 0)])
def test_sizes_of_zero(batch: int, rows: int, paged: bool):
    given = block()
    given |= {name: given[name][:batch] for name in ("k_cache", "v_cache", "lengths")}
    given |= {"num_rows": i32([0] * batch), "qkv": given["qkv"][:batch, :rows]}
    if paged:
        given["block_table"] = torch.zeros(batch, 0, dtype=torch.int32)
        given["lengths"] = i32([0] * batch)
    before = given["k_cache"].clone()
    assert ek.rope_cache_write(**given).shape == (batch, rows, HEADS, SIZE)
    assert torch.equal(given["k_cache"], before)


def test_out():
    given = block()
    want = ek.rope_cache_write(**given)
    out = torch.full_like(want, torch.nan)
    assert ek.rope_cache_write(**given, out=out) is out
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match=r"rope_cache_write: out: expected shape \[B, T, 4, D\]"):
        ek.rope_cache_write(**given, out=out[:, :, :3])
    with pytest.raises(TypeError, match="rope_cache_write: out: expected dtype"):
        ek.rope_cache_write(**given, out=out.double())


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
def test_opcheck_of_a_paged_cache(tree: bool):
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    given = block()
    given["k_cache"], given["block_table"] = pages_of(given["k_cache"], 4)
    given["v_cache"] = torch.randn_like(given["k_cache"])
    given["depth"] = i32([[0, 1, 1, 2, 3]] * 3) if tree else None
    op = torch.ops.eesd.rope_cache_write.default
    torch.library.opcheck(op, [given.get(a.name) for a in op._schema.arguments])


TABLE = {"k_cache": torch.zeros(9, 8, KV_HEADS, SIZE), "v_cache": torch.zeros(9, 8, KV_HEADS, SIZE)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": i32([3, 0, 6])}, r"num_rows: expected 0 to 5, got \[3, 0, 6\]"),
        ({"num_rows": i32([3, -1, 5])}, r"num_rows: expected 0 to 5, got \[3, -1, 5\]"),
        (
            {"lengths": i32([0, 11, 26])},
            r"lengths: expected the block's slots from 0 to 29, got lengths \[0, 11, 26\]",
        ),
        ({"lengths": i32([-1, 11, 25])}, "lengths: expected the block's slots from 0 to 29"),
        ({"depth": i32([[0, 1, 2, 3, 15]] * 3)}, "depth: expected positions from 0 to 39"),
        ({"depth": i32([[-1, 1, 2, 3, 4]] * 3)}, "depth: expected positions from 0 to 39"),
        (
            {"cos": torch.ones(29, 3), "sin": torch.ones(29, 3)},
            "lengths: expected positions from 0 to 28",
        ),
        (
            {**TABLE, "block_table": i32([[0] * 4, [1] * 4, [2, 3, 4, 9]])},
            "block_table: expected pages from 0 to 8",
        ),
        (
            {**TABLE, "block_table": i32([[-1] * 4, [1] * 4, [2, 3, 4, 5]])},
            "block_table: expected pages from 0 to 8",
        ),
        (
            {**TABLE, "block_table": i32([[0] * 3] * 3)},
            "lengths: expected the block's slots from 0 to 23",
        ),
        (
            {"k_cache": torch.zeros(3, 30, 2, 5), "v_cache": torch.zeros(3, 30, 2, 5)},
            "k_cache: expected D even, 2 or more, got 5",
        ),
        (
            {"k_cache": torch.zeros(3, 30, 2, 0), "v_cache": torch.zeros(3, 30, 2, 0)},
            "k_cache: expected D even, 2 or more, got 0",
        ),
        (
            {"k_cache": torch.zeros(3, 30, 0, 6), "v_cache": torch.zeros(3, 30, 0, 6)},
            "k_cache: expected Hkv at least 1, got 0",
        ),
        ({"qkv": torch.zeros(3, 5, 24)}, "qkv: expected .Hq . 2 Hkv. D columns"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str):
    given = block()
    before = given["k_cache"].clone()
    with pytest.raises(ValueError, match=f"rope_cache_write: {message}"):
        ek.rope_cache_write(**{**given, **changes})
    assert torch.equal(given["k_cache"], before)


def test_pages_of_dead_rows_may_be_missing_from_the_table():
    given = block()
    k, table = pages_of(given["k_cache"], 4)
    given |= {"k_cache": k, "v_cache": torch.randn_like(k)}
    want = ek.rope_cache_write(**given, block_table=table)
    table[0, 1:], table[1], table[2, :6] = -1, 99, -1  # slots 0 to 2; none; 25 to 29
    assert torch.equal(ek.rope_cache_write(**given, block_table=table), want)
