"""rope_cache_write's kernel against its reference, bit by bit: queries and every slot."""

from typing import Any

import pytest
import torch
from pages import pages_of
from torch import Tensor

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton.rope_cache_write import rope_cache_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FORMS = ["contiguous", "pages of 1", "pages of 3"]
WRITTEN = ("q", "k_cache", "v_cache")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def block(
    batch: int = 4,
    rows: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 6,
    slots: int = 30,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    form: str = "contiguous",
    tree: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Ragged: the last sequence ends with the cache, the second is dead."""
    g = torch.Generator(DEVICE).manual_seed(seed + rows)
    torch.manual_seed(seed)

    def random(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, device=DEVICE, dtype=torch.int32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE)

    angle = normal(slots + 3, size // 2) * 3
    cache = normal(2, batch, slots, kv_heads, size).to(cache_dtype or dtype)
    table = None
    if form != "contiguous":
        cache, table = pages_of(cache, int(form.split()[2]))
    lengths, num_rows = random(batch, low=0, high=slots - rows), random(batch, low=1, high=rows + 1)
    lengths[-1], num_rows[-1] = slots - rows, rows
    num_rows[1:2] = 0 if batch > 2 else rows
    # Not the row's number, so that the slot and the position differ.
    depth = torch.clamp(random(batch, rows, low=0, high=rows), max=2) if tree else None
    return {
        "qkv": normal(batch, rows, (heads + 2 * kv_heads) * size).to(dtype),
        "cos": angle.cos(), "sin": angle.sin(), "k_cache": cache[0], "v_cache": cache[1],
        "lengths": lengths, "num_rows": num_rows, "depth": depth, "block_table": table,
    }  # fmt: skip


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}


def check(given: dict[str, Any]) -> dict[str, Tensor]:
    """The results and both caches are the reference's; nothing else is written."""
    mine, theirs = given, copied(given)
    q = reference.rope_cache_write(**theirs)
    out = torch.full_like(q, torch.nan)
    assert rope_cache_write(**mine, out=(out,)) is out
    truncates = DEVICE == "cpu" and torch.bfloat16 in (q.dtype, mine["k_cache"].dtype)
    for name, got, want in (
        ("q", out, q), *((name, mine[name], theirs[name]) for name in mine),
    ):  # fmt: skip
        if not isinstance(got, Tensor) or not isinstance(want, Tensor):
            continue
        if truncates and name in WRITTEN:  # the interpreter, where it stores bfloat16
            torch.testing.assert_close(got, want, rtol=8e-3, atol=8e-3)
        else:
            assert torch.equal(bits(got), bits(want)), name
    return {"q": out, "k_cache": mine["k_cache"], "v_cache": mine["v_cache"]}


@pytest.mark.parametrize("tree", [False, True], ids=["linear", "tree"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype, form: str, tree: bool) -> None:
    check(block(3, 3, dtype=dtype, form=form, tree=tree))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(1, 1, 2), (3, 1, 10), (9, 2, 128), (2, 2, 1100), (200, 3, 8)],
    ids=str,
)
def test_groups_of_heads(heads: int, kv_heads: int, size: int) -> None:
    """A head, groups that heads do not fill, several groups, a head wider than a group."""
    check(block(2, 2, heads, kv_heads, size, 6))


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_another_dtype(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """k is rounded to the dtype of qkv first."""
    check(block(2, 2, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tables_of_another_dtype(table_dtype: torch.dtype) -> None:
    given = block(2, 2)
    check({**given, "cos": given["cos"].to(table_dtype), "sin": given["sin"].to(table_dtype)})


def test_values_are_copied_bit_by_bit() -> None:
    """NaNs with a payload, infinities and -0, which no arithmetic would keep."""
    given = block()
    given["num_rows"].fill_(5)
    values = given["qkv"].view(4, 5, -1, 6)[:, :, 6:]
    special = torch.tensor([0x7FC12345, -0x3EDCBB, 0x7F800000, -0x80000000, 1, -1])
    values.copy_(special.int().to(DEVICE).view(torch.float32).expand_as(values))
    rope_cache_write(**given)
    for b in range(4):
        c = int(given["lengths"][b])
        assert torch.equal(bits(given["v_cache"][b, c : c + 5]), bits(values[b]))


def test_strided_arguments() -> None:
    """K and V with strides of their own, heads before slots, rows in a frame."""
    given = block(rows=2)
    frame = torch.randn(4, 7, 60, device=DEVICE)
    for qkv in (frame[:, 1:3, 5:53], torch.randn(4, 2, 96, device=DEVICE)[:, :, ::2]):
        k = torch.randn(4, 2, 30, 6, device=DEVICE).transpose(1, 2)
        v = torch.randn(6, 31, 4, 9, device=DEVICE)[1:5, 1:, ::2, 1:7]
        each = {name: given[name].repeat_interleave(2)[::2] for name in ("lengths", "num_rows")}
        check({**given, **each, "qkv": qkv, "k_cache": k, "v_cache": v})


@pytest.mark.parametrize("form", ["contiguous", "pages of 4"])
@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (3, 0)])
def test_sizes_of_zero(batch: int, rows: int, form: str) -> None:
    given = block(form=form)
    each = {
        k: given[k][:batch] for k in ("lengths", "num_rows", "block_table") if given[k] is not None
    }
    if form == "contiguous":
        each |= {k: given[k][:batch] for k in ("k_cache", "v_cache")}
    given |= {**each, "qkv": given["qkv"][:batch, :rows]}
    given["num_rows"].zero_()
    before = copied(given)
    got = rope_cache_write(**given)
    assert got is not None
    assert got.shape == (batch, rows, 4, 6)
    assert torch.equal(given["k_cache"], before["k_cache"])


def test_leaves_float64_to_the_reference() -> None:
    given = block()
    assert rope_cache_write(**{**given, "qkv": given["qkv"].double()}) is None


def test_rows_outside_write_nothing_and_are_nan() -> None:
    """Slots beyond the end and before the start, positions beyond the tables: their rows alone."""
    given = block()
    whole = torch.randn(2, 8, 30, 2, 6, device=DEVICE)
    given |= {"k_cache": whole[0, 2:6], "v_cache": whole[1, 2:6], "depth": None}
    given["num_rows"].fill_(5)
    given["lengths"].copy_(torch.tensor([27, -2, 2_000_000_000, 3]))
    given["depth"] = torch.arange(5, device=DEVICE, dtype=torch.int32).repeat(4, 1)
    given["depth"][3, 2], given["depth"][3, 4] = 31, -4  # positions 34 and -1, of 33
    bad = [(0, 3), (0, 4), (1, 0), (1, 1), *((2, i) for i in range(5)), (3, 2), (3, 4)]
    before, want = whole.clone(), copied(given)
    q = rope_cache_write(**given)
    assert q is not None
    for b in range(4):
        for i in range(5):
            if (b, i) in bad:
                assert q[b, i].isnan().all()
                continue
            row = {
                **want, "qkv": want["qkv"][b : b + 1, i : i + 1],
                "k_cache": before[0, b + 2 : b + 3], "v_cache": before[1, b + 2 : b + 3],
                "lengths": want["lengths"][b : b + 1] + i, "num_rows": want["num_rows"][:1] * 0 + 1,
                "depth": want["depth"][b : b + 1, i : i + 1] - i,
            }  # fmt: skip
            assert torch.equal(bits(q[b, i]), bits(reference.rope_cache_write(**row)[0, 0]))
    assert torch.equal(bits(whole), bits(before))  # which the good rows above have written too


def test_pages_that_are_not_there() -> None:
    given = block(form="pages of 4", batch=2)
    given["num_rows"].fill_(5)
    given["lengths"].copy_(torch.tensor([2, 27]))
    pages = given["k_cache"].shape[0]
    given["block_table"][0, 0], given["block_table"][1, 6] = -1, pages
    before = copied(given)
    q = rope_cache_write(**given)
    assert q is not None
    assert q.isnan().all(3).all(2).tolist() == [[True] * 2 + [False] * 3, [True] + [False] * 4]
    changed = (given["v_cache"] != before["v_cache"]).flatten(2).any(2)
    mine = torch.zeros_like(changed)
    for b, slot in ((0, 4), (0, 5), (0, 6), (1, 28), (1, 29), (1, 30), (1, 31)):
        mine[given["block_table"][b, slot // 4], slot % 4] = True
    assert torch.equal(changed, mine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    given = block(rows=5, dtype=dtype, tree=True)
    given["num_rows"].fill_(5)
    alone = copied(given)
    together = check(given)
    for b, i in ((0, 0), (2, 3), (3, 4)):
        row = {
            **copied(alone), "qkv": alone["qkv"][b : b + 1, i : i + 1],
            "k_cache": alone["k_cache"][b : b + 1], "v_cache": alone["v_cache"][b : b + 1],
            "lengths": alone["lengths"][b : b + 1] + i, "num_rows": alone["num_rows"][:1] * 0 + 1,
            "depth": alone["depth"][b : b + 1, i : i + 1] - i,
        }  # fmt: skip
        got = rope_cache_write(**row)
        assert got is not None
        assert torch.equal(bits(got[0, 0]), bits(together["q"][b, i]))
        at = int(row["lengths"])
        for name in ("k_cache", "v_cache"):
            assert torch.equal(bits(row[name][0, at]), bits(together[name][b, at]))


REAL = {  # heads, KV heads, head size, slots
    "13b": (40, 40, 128, 1200), "70b": (64, 8, 128, 1200), "qwen 0.5b": (14, 2, 64, 1200),
    "phi 2": (32, 32, 80, 1200), "gemma 2b": (8, 1, 256, 1200),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["contiguous", "pages of 16"])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: str, form: str) -> None:
    heads, kv_heads, size, slots = REAL[shape]
    for batch, rows, tree in ((1, 1, False), (1, 64, True), (16, 6, False), (5, 32, True)):
        check(
            block(batch, rows, heads, kv_heads, size, slots, torch.bfloat16, form=form, tree=tree)
        )


@pytest.mark.gpu
def test_a_long_prefill() -> None:
    """Rows beyond 65,535 in all, and one sequence's part of a cache."""
    given = block(1, 70_000, 8, 1, 64, 70_500, torch.bfloat16)
    given["lengths"].fill_(100)
    check(given)
    many = block(9, 33, 40, 40, 128, 300, torch.bfloat16)
    one = slice(4, 5)
    check(
        {**many, **{k: many[k][one] for k in ("qkv", "k_cache", "v_cache", "lengths", "num_rows")}}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["contiguous", "pages of 16"])
def test_graph_replay_and_out(form: str) -> None:
    first, second = (
        block(8, 6, 40, 40, 128, 100, torch.bfloat16, form=form, tree=True, seed=s) for s in (1, 2)
    )
    static = copied(first)
    out = torch.empty(8, 6, 40, 128, dtype=torch.bfloat16, device=DEVICE)
    ek.rope_cache_write(**static, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.rope_cache_write(**static, out=out)
    for given in (first, second, first):
        for name, value in given.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        want = copied(given)
        assert torch.equal(out, reference.rope_cache_write(**want))
        for name in ("k_cache", "v_cache"):
            assert torch.equal(bits(static[name]), bits(want[name]))


@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    given = block(2, 3, 8, 2, 64, 20, torch.bfloat16)
    mine, theirs = (list(copied(given).values()) for _ in range(2))
    op = torch.ops.eesd.rope_cache_write
    got = torch.compile(lambda *x: op(*x) * 2, fullgraph=True, backend="aot_eager")(*mine)
    assert torch.equal(got, op(*theirs) * 2)
    assert torch.equal(mine[3], theirs[3])
