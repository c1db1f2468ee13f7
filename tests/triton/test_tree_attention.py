"""tree_attention's kernel against its reference in float64, and every row's bits in every guise."""

from typing import Any

import pytest
import torch
from pages import pages_of, unpaged
from torch import Tensor
from trees import random_parents
from triton.runtime import interpreter

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton import tree_attention as kernels
from eesd_kernels.triton.launch import architecture
from eesd_kernels.triton.tree_attention import Tiles, tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a head's result, error over size: roundings of the weights and of the result. float32 differs
# from float64 by its scores and its exp2. The interpreter truncates bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Tiles(32, 16, 16, 4, 1, 512, fine=64)  # several chunks, of one tile and of two
LENGTHS = [70, 33, 32, 31, 1, 0]
PATHS = {"linear": False, "tree": True}
CACHES = ("k_cache", "v_cache")
BAD = [torch.nan, torch.inf, -torch.inf]
Given = dict[str, Any]


def block(
    lengths: list[int],
    rows: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    *,
    tree: bool = False,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    page: int | None = None,
    num_rows: list[int] | None = None,
    spare: int = 0,
    seed: int = 0,
) -> Given:
    """The op's arguments. Slots that nobody may see hold NaN, those beyond the longest spare."""
    g = torch.Generator(DEVICE).manual_seed(seed + rows)
    torch.manual_seed(seed)
    batch, live = len(lengths), num_rows or [rows] * len(lengths)
    cache = torch.empty(2, batch, max(lengths) + rows + spare, kv_heads, size, device=DEVICE)
    cache.normal_(generator=g)
    for b in range(batch):
        cache[:, b, lengths[b] + live[b] :] = torch.nan
    table = None
    if page is not None:
        cache, table = pages_of(cache, page)
    q = torch.empty(batch, rows, heads, size, device=DEVICE).normal_(generator=g)
    return {
        "q": q.to(dtype), "k_cache": cache[0].to(dtype), "v_cache": cache[1].to(dtype),
        "lengths": i32(lengths), "num_rows": i32(live), "scale": size**-0.5,
        "ancestry": ancestry(random_parents(batch, rows, g)) if tree else None,
        "block_table": table, "window": window,
    }  # fmt: skip


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ancestry(parents: Tensor) -> Tensor:
    """A bit mask a node, node 63's bit the sign; in every other sequence rubbish above its own."""
    masks = torch.zeros(parents.shape, dtype=torch.int64)
    one = torch.ones((), dtype=torch.int64)
    for b, row in enumerate(parents.tolist()):
        for i, parent in enumerate(row):
            masks[b, i] = one << i | (masks[b, parent] if parent >= 0 else 0)
    masks[1::2] |= -2 * one << torch.arange(parents.shape[1])
    return masks.to(DEVICE)


def path_of(given: Given, b: int, node: int) -> list[int]:
    mask = int(given["ancestry"][b, node])
    return [j for j in range(node + 1) if mask >> j & 1]


def run(given: Given, tiles: Tiles | None = SMALL) -> Tensor:
    got = tree_attention(**given, tiles=tiles)
    assert got is not None
    return got


def in_double(given: Given) -> Tensor:
    inputs = {k: given[k].double() for k in ("q", *CACHES)}
    return reference.tree_attention(**{**given, **inputs})


def error(got: Tensor, want: Tensor) -> float:
    """The largest of any row and head, over its size."""
    worst = (got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-9)
    return float(worst.max()) if worst.numel() else 0.0


def close(got: Tensor, given: Given) -> None:
    assert got.dtype is given["q"].dtype
    assert error(got, in_double(given)) < TOLERANCE[got.dtype]


def row_by_row(given: Given, b: int) -> Given:
    """Every row of a sequence with T = 1: a batch of its rows, all over the same cache."""
    count = int(given["num_rows"][b])
    table = given["block_table"]
    each = torch.arange(count, device=DEVICE, dtype=torch.int32)
    mine = {
        "q": given["q"][b, :count, None], "ancestry": None, "num_rows": torch.ones_like(each),
        "lengths": given["lengths"][b] + each,
        "block_table": None if table is None else table[b : b + 1].expand(count, -1),
    }  # fmt: skip
    if table is None:
        cache = {k: given[k][b : b + 1] for k in CACHES}
        mine |= {k: x.expand(count, -1, -1, -1) for k, x in cache.items()}
    return {**given, **mine}


def as_line(given: Given, b: int, path: list[int]) -> Given:
    """A path of a tree as a linear block: its tokens in place behind the cached ones."""
    length, nodes = int(given["lengths"][b]), torch.tensor(path, device=DEVICE)
    mine: Given = {"q": given["q"][b : b + 1, nodes], "ancestry": None}
    for name in CACHES:
        mine[name] = given[name][b : b + 1].clone()
        mine[name][0, length : length + len(path)] = given[name][b, length + nodes]
        mine[name][0, length + len(path) :] = torch.nan
    mine |= {"lengths": i32([length]), "num_rows": i32([len(path)])}
    return {**given, **mine}


def assert_rows_alone(given: Given, got: Tensor, tiles: Tiles | None = SMALL) -> None:
    for b in range(len(got)):
        alone = run(row_by_row(given, b), tiles)
        assert torch.equal(alone[:, 0], got[b, : len(alone)]), b


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_equals_the_reference(tree: bool, page: int | None, window: int | None) -> None:
    """Contexts about the ends of chunks; dead rows, and a sequence of them, give zeros."""
    live = [5, 5, 1, 0, 4, 5]
    given = block(LENGTHS, 5, 2, 1, tree=tree, page=page, window=window, num_rows=live)
    got = run(given)
    close(got, given)
    assert not any(got[b, n:].any() for b, n in enumerate(live))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(2, 2, 64), (4, 2, 80), (8, 1, 128), (3, 1, 256), (20, 1, 16)],
    ids=str,
)
def test_groups_and_head_sizes(heads: int, kv_heads: int, size: int) -> None:
    """The last: a group of more heads than a tile has rows."""
    given = block([37, 2], 3, heads, kv_heads, size, tree=True)
    got = run(given)
    close(got, given)
    path = path_of(given, 0, 2)
    assert torch.equal(run(as_line(given, 0, path))[0], got[0, path])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    given = block([37, 2], 3, dtype=dtype)
    close(run(given), given)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 33, 75, 2**31 - 1])
@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_windows(tree: bool, window: int) -> None:
    """A window one wider or narrower would show: results differ by more than is let pass."""
    given = block([70, 14], 4, 2, 1, tree=tree, window=window)
    got = run(given)
    close(got, given)
    for wrong in (window - 1, window + 1):
        if 0 < wrong < 60:  # one that hides something
            assert error(got, in_double({**given, "window": wrong})) > 0.01


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_alone_in_a_block_and_anywhere_in_a_batch(
    window: int | None,
) -> None:
    given = block([70, 30, 31, 0], 4, 2, 1, window=window)
    got = run(given)
    assert_rows_alone(given, got)
    order = i32([2, 3, 1, 0]).long()
    each = ("q", "k_cache", "v_cache", "lengths", "num_rows")
    assert torch.equal(run({**given, **{k: given[k][order] for k in each}}), got[order])
    fewer = {"q": given["q"][:, :3], "num_rows": given["num_rows"] - 1}
    assert torch.equal(run({**given, **fewer}), got[:, :3])


@pytest.mark.parametrize("window", [None, 20])
def test_a_node_has_the_bits_of_its_path_as_a_line(window: int | None) -> None:
    """Around the ends of chunks and tiles too, where slots and positions fall apart; across the
    place where chunks grow."""
    given = block([70, 31, 30, 13, 62], 9, 1, 1, tree=True, window=window)
    got = run(given)
    for b in range(len(got)):
        node = max(range(5, 9), key=lambda i: len(path_of(given, b, i)))
        path = path_of(given, b, node)
        line = run(as_line(given, b, path))
        assert torch.equal(line[0], got[b, path]), (b, path)
        alone = as_line(given, b, path)
        alone["q"] = alone["q"][:, -1:]
        alone |= {"lengths": alone["lengths"] + len(path) - 1, "num_rows": i32([1])}
        assert torch.equal(run(alone)[0, 0], got[b, node]), (b, path)


@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_pages_have_the_bits_of_the_contiguous_cache(tree: bool) -> None:
    for size, lengths, window in ((16, [40, 31, 0], None), (256, [254], 40)):
        given = block(lengths, 4, 2, 1, tree=tree, window=window)
        (k, v), table = pages_of(torch.stack((given["k_cache"], given["v_cache"])), size)
        paged = {"k_cache": k, "v_cache": v, "block_table": table}
        assert torch.equal(run({**given, **paged}), run(given)), size


def test_more_chunks_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMBINED", 32)  # 2 chunks of 16 numbers
    for window in (None, 70):
        given = block([150, 63], 2, 1, 1, window=window)
        got = run(given)
        close(got, given)
        assert_rows_alone(given, got)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order; a GPU has its own")
@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_no_program_mends_what_another_wrote(tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards, one that writes where it should not would go unseen."""
    given = block([70, 31], 5, 2, 1, tree=tree)
    want = run(given)
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def backwards(*at: int) -> None:
        place(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert torch.equal(run(given), want)


@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_the_grid_and_the_room_beyond_do_not_show(
    tree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that loop over chunks, row tiles of 16 and of 32, a larger cache."""
    given = block([170], 6, 4, 1, tree=tree, window=150)
    want = run(given)
    monkeypatch.setattr(kernels, "FEWEST_SLOTS", 1)
    for programs, rows in ((1, 16), (2, 32)):
        assert torch.equal(run(given, SMALL._replace(programs=programs, rows=rows)), want)
    larger = {k: torch.nn.functional.pad(given[k], (0, 0, 0, 0, 0, 99)) for k in CACHES}
    assert torch.equal(run({**given, **larger}), want)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tree", PATHS.values(), ids=PATHS)
def test_a_bad_number_reaches_only_the_rows_that_see_it(tree: bool, window: int | None) -> None:
    """In K and V, cached and in the block: the rows that see it, of the head's group alone."""
    # Slots: one out of the window's reach, the last of reach for the first row, two of the block.
    bad = [
        (3, "v_cache", torch.nan), (21, "k_cache", torch.nan), (21, "v_cache", torch.inf),
        (41, "k_cache", torch.nan), (41, "v_cache", -torch.inf), (42, "v_cache", torch.nan),
    ]  # fmt: skip
    given = block([40] * len(bad), 3, 2, 2, tree=tree, window=window)
    want = run(given)
    spoilt = {**given, **{k: given[k].clone() for k in CACHES}}
    sees = torch.zeros(want.shape[:3], dtype=torch.bool, device=DEVICE)
    for b, (slot, name, value) in enumerate(bad):
        spoilt[name][b, slot, 1, 5] = value
        for i in range(3):
            line = path_of(given, b, i) if tree else list(range(i + 1))
            slots = [*range(40), *(40 + j for j in line)]
            sees[b, i, 1] = slot in (slots[-window:] if window else slots)
    got = run(spoilt)
    assert torch.equal(got.isfinite().all(-1), ~sees)
    assert torch.equal(got[~sees], want[~sees])


def test_an_infinite_key_and_a_bad_query_stay_where_they_are() -> None:
    given = block([40, 3], 5, 4, 2)
    want = run(given)
    for value in BAD:
        spoilt = {k: given[k].clone() for k in ("q", "k_cache")}
        spoilt["q"][0, 1, 3, 0] = value
        spoilt["k_cache"][1, 6, 0, 5] = value  # the fourth node
        got = run({**given, **spoilt})
        assert got[0, 1, 3].isnan().all()
        got[0, 1, 3] = want[0, 1, 3]
        assert not torch.equal(got[1, 3:, :2], want[1, 3:, :2])
        got[1, 3:, :2] = want[1, 3:, :2]
        assert torch.equal(got, want)


def test_a_key_that_no_row_weighs() -> None:
    """Scores of -inf: the weight is 0, and where there is no other key the result NaN."""
    given = block([20, 0], 2, 2, 1)
    given["q"].abs_()
    for b, slot in ((0, 7), (1, 0)):
        given["k_cache"][b, slot, 0, 5] = -torch.inf
    got = run(given)
    assert error(got[:1], in_double(given)[:1]) < TOLERANCE[torch.float32]
    assert got[1, 0].isnan().all()
    assert error(got[1:, 1:], in_double(given)[1:, 1:]) < TOLERANCE[torch.float32]


def test_lengths_that_the_cache_does_not_hold_stay_within_it() -> None:
    given = block([30, 20, 10, 5, 8], 5, 1, 1, tree=True)
    want = run(given)
    given["lengths"].copy_(i32([2**31 - 1, 20, -7, 5, 8]))
    given["num_rows"].copy_(i32([5, 99, 5, -1, 5]))
    got = run(given)
    assert torch.equal(got[[0, 1, 4]], want[[0, 1, 4]])  # the first's are the last that there are
    assert not got[3].any()


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch: int, rows: int, page: int | None) -> None:
    given = block([5, 6], 3, page=page)
    some = {k: given[k][:batch] for k in ("lengths", "num_rows")}
    if page is None:
        some |= {k: given[k][:batch] for k in CACHES}
    else:
        some["block_table"] = given["block_table"][:batch]
    got = run({**given, **some, "q": given["q"][:batch, :rows]})
    assert got.shape == (batch, rows, 4, 16)


def test_strided_arguments_and_out() -> None:
    """Heads before slots, a frame around q and V, every other length; nothing else is written."""
    given = block([40, 12], 3, tree=True)
    want = run(given)
    frame = torch.randn(2, 5, 9, 20, device=DEVICE)
    frame[:, 1:4, 1::2, 2:18] = given["q"]
    wide = torch.full((3, 50, 4, 19), torch.nan, device=DEVICE)
    wide[1:, 2:45, ::2, 1:17] = given["v_cache"]
    some = {
        "q": frame[:, 1:4, 1::2, 2:18], "v_cache": wide[1:, 2:45, ::2, 1:17],
        "k_cache": given["k_cache"].transpose(1, 2).contiguous().transpose(1, 2),
        **{k: given[k].repeat_interleave(2, 0)[::2] for k in ("lengths", "num_rows", "ancestry")},
    }  # fmt: skip
    around = torch.full((4, *want.shape[1:]), 7.0, device=DEVICE)
    out = around[1:3]
    assert tree_attention(**{**given, **some}, tiles=SMALL, out=(out,)) is out
    assert torch.equal(out, want)
    assert bool((around[::3] == 7).all())


def test_leaves_to_the_reference() -> None:
    given = block([4], 2)
    halves = {k: given[k].half() for k in CACHES}
    doubles = {k: given[k].double() for k in ("q", *CACHES)}
    for other in (halves, doubles, block([4], 2, size=257)):
        assert tree_attention(**{**given, **other}) is None


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("page", [None, 16])
def test_out_of_the_public_function(page: int | None, device: str) -> None:
    given = block([40, 12], 3, page=page, tree=True, window=9)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    want = ek.tree_attention(**given)
    close(want, given)
    out = torch.full_like(want, torch.nan)
    assert ek.tree_attention(**given, out=out) is out
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match=r"tree_attention: out: expected shape"):
        ek.tree_attention(**given, out=out[:, 1:])


SHAPES = {
    "13b": (40, 40, 128), "3-8b": (32, 8, 128), "70b": (64, 8, 128), "of 64": (32, 32, 64),
    "of 256": (8, 4, 256),
}  # fmt: skip
REAL = [0, 1, 255, 256, 257, 513, 1022, 4200]
FORMS: dict[str, Given] = {
    "one row": {"rows": 1},
    "six in pages": {"rows": 6, "page": 16},
    "sixteen in a window": {"rows": 16, "window": 1000},
    "a tree": {"rows": 64, "tree": True},
    "a tree in pages and a window": {"rows": 33, "tree": True, "page": 256, "window": 300},
}
FEWER = ("one row", "a tree in pages and a window")  # a variant takes half a second to compile


def real_block(shape: str, form: str, lengths: list[int], **options: Any) -> Given:
    heads, kv_heads, size = SHAPES[shape]
    given = {"dtype": torch.bfloat16, **FORMS[form], **options}
    return block(lengths, heads=heads, kv_heads=kv_heads, size=size, **given)


def assert_right(given: Given) -> None:
    """Against float64; the bits of rows alone, or of nodes as lines and of a cache in pages."""
    got = run(given, None)
    close(got, given)
    if given["ancestry"] is None:
        assert_rows_alone(given, got, None)
        return
    if given["block_table"] is not None:
        flat = {k: unpaged(given[k], given["block_table"], 4300) for k in CACHES}
        given = {**given, **flat, "block_table": None}
        assert torch.equal(run(given, None), got)
    for b in range(len(got)):
        for node in (got.shape[1] - 1, 20):
            path = path_of(given, b, node)
            assert torch.equal(run(as_line(given, b, path), None)[0], got[b, path]), (b, node)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "form"),
    [(s, f) for s in SHAPES for f in FORMS if s in ("13b", "3-8b") or f in FEWER],
    ids=str,
)
def test_real_shapes(shape: str, form: str) -> None:
    assert_right(real_block(shape, form, REAL))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes_at_a_real_shape(dtype: torch.dtype) -> None:
    assert_right(real_block("3-8b", "a tree in pages and a window", REAL, dtype=dtype))


@pytest.mark.gpu
def test_long_contexts() -> None:
    """More chunks than are added up at once; slots of many programs, and chunks that they loop."""
    for lengths in ([33_000], [9_000, 20_000, 8_191, 16_384]):
        assert_right(real_block("3-8b", "sixteen in a window", lengths, window=None))
        assert_right(real_block("3-8b", "sixteen in a window", lengths, window=17_000))


@pytest.mark.gpu
def test_tiles_do_not_show() -> None:
    """Tensor cores: rows in another place of another tile, shared by other warps."""
    given = real_block("3-8b", "a tree", REAL)
    tiles = kernels.tiles_of(8, 128, torch.bfloat16, architecture(given["q"].device))
    want = run(given, tiles)
    for other in ({"rows": 16}, {"warps": 8}, {"warps": 2}, {"stages": 2}, {"programs": 8}):
        assert torch.equal(run(given, tiles._replace(**other)), want), other


@pytest.mark.gpu
def test_many_launches_give_the_same_bits() -> None:
    """The second kernel reading before the first has written would show, and so would a race."""
    given = real_block("13b", "six in pages", [1200, 300, 7])
    want = run(given, None)
    other = torch.cuda.Stream()
    for _ in range(200):
        with torch.cuda.stream(other):
            torch.empty(1 << 22, device=DEVICE).random_()  # company on the multiprocessors
        assert torch.equal(run(given, None), want)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["six in pages", "a tree"])
def test_graph_replay(form: str) -> None:
    """Lengths, rows, ancestries and pages are read at replay."""
    static = real_block("3-8b", form, [4200, 0, 700], seed=1)
    rows = static["q"].shape[1]
    live = [[rows, rows, 2], [0, rows, rows], [3, 1, rows]]
    lengths = [[4200, 0, 700], [3, 255, 4200], [257, 4100, 1]]
    calls = []
    for seed, (length, count) in enumerate(zip(lengths, live, strict=True)):
        given = real_block("3-8b", form, [4200, 0, 700], seed=seed)
        for name in CACHES:  # all slots in use
            given[name].nan_to_num_(nan=0.5)
        calls.append({**given, "lengths": i32(length), "num_rows": i32(count)})
    out, graph = torch.empty_like(static["q"]), torch.cuda.CUDAGraph()
    ek.tree_attention(**static, out=out)
    with torch.cuda.graph(graph):
        ek.tree_attention(**static, out=out)
    for given in [*calls, calls[0]]:
        for name, value in given.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, run(given, None))
        close(out, given)


@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    given = real_block("3-8b", "a tree in pages and a window", REAL)
    op = torch.ops.eesd.tree_attention
    compiled = torch.compile(lambda x: op(**x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given), op(**given) * 2)
