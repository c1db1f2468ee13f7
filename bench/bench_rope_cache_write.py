"""Rotary embedding with the write into the cache, one launch, beside an empty kernel and a copy.

bf16, one layer, from one decoding step to a chunk of prefill, lines and trees. Sets of inputs
rotate past three times the L2 where 64 reach that; a decoding step's stay within it, as they do in
a decoder. Composed PyTorch rotates, concatenates and scatters.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.empty_kernel import empty_launches
from bench.harness import Call, arguments, copy_bandwidth, input_sets, measure, print_table
from bench.results import write_results
from eesd_kernels import reference, rope_cache_write

PAGE = 16
SLOTS = 2048
MODELS = {  # heads, KV heads, head size
    "7b": (32, 32, 128), "13b": (40, 40, 128), "70b": (64, 8, 128), "3-8b": (32, 8, 128),
}  # fmt: skip
CASES = [
    (model, batch, rows, tree)
    for model in MODELS
    for batch, rows, tree in (
        (1, 1, False), (1, 6, False), (1, 32, True), (64, 1, False), (64, 6, False), (64, 32, True),
        (1, 512, False),
    )
]  # fmt: skip


class Inputs(NamedTuple):
    """One set: the op's arguments but for the caches and tables, and where to write queries."""

    qkv: Tensor
    lengths: Tensor
    num_rows: Tensor
    depth: Tensor | None
    out: Tensor


class Cache(NamedTuple):
    k: Tensor
    v: Tensor
    table: Tensor | None

    def clone(self) -> "Cache":
        return Cache(self.k.clone(), self.v.clone(), self.table)


def new_cache(model: str, batch: int, paged: bool) -> Cache:
    """Zeros; the pages of the sequences in random order."""
    _, heads, size = MODELS[model]
    shape = (batch * SLOTS // PAGE, PAGE) if paged else (batch, SLOTS)
    table = torch.randperm(shape[0], device="cuda").int().view(batch, -1) if paged else None
    k, v = torch.zeros(2, *shape, heads, size, dtype=torch.bfloat16, device="cuda")
    return Cache(k, v, table)


def inputs(model: str, batch: int, rows: int, tree: bool, number: int) -> Inputs:
    heads, kv_heads, size = MODELS[model]
    width = (heads + 2 * kv_heads) * size
    qkv = torch.empty(batch, rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    each = torch.arange(batch, device="cuda").int()
    lengths = (number * 97 + each * 31) % (SLOTS - rows + 1)
    depth = None
    if tree:  # levels of one, two, four, .. nodes
        node = torch.arange(rows, device="cuda") + 1
        depth = node.float().log2().floor().int().expand(batch, -1).contiguous()
    out = torch.empty(batch, rows, heads, size, dtype=torch.bfloat16, device="cuda")
    return Inputs(qkv, lengths.int(), torch.full_like(each, rows), depth, out)


def call(case: Inputs, angles: tuple[Tensor, Tensor], cache: Cache, op: Any, **out: Tensor) -> Any:
    return op(
        case.qkv, *angles, cache.k, cache.v, case.lengths, case.num_rows, depth=case.depth,
        block_table=cache.table, **out,
    )  # fmt: skip


def equals_the_reference(case: Inputs, angles: tuple[Tensor, Tensor], cache: Cache) -> bool:
    """Every byte of the queries and of both caches."""
    mine, theirs = cache.clone(), cache.clone()
    want = call(case, angles, theirs, reference.rope_cache_write)
    got = call(case, angles, mine, rope_cache_write, out=case.out)
    pairs = ((got, want), (mine.k, theirs.k), (mine.v, theirs.v))
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def rows_are_equal(case: Inputs, angles: tuple[Tensor, Tensor], cache: Cache) -> bool:
    """Whether sequences in the opposite order have the same bits, and so has the last row of every
    seventh sequence alone."""
    i, one = case.qkv.shape[1] - 1, torch.ones_like(case.num_rows)
    mine, theirs = cache.clone(), cache.clone()
    together = call(case, angles, mine, rope_cache_write)
    back = Inputs(*(None if x is None else x.flip(0).contiguous() for x in case))
    turned = Cache(*(x if mine.table is not None else x.flip(0) for x in theirs.clone()[:2]),
                   None if mine.table is None else mine.table.flip(0).contiguous())  # fmt: skip
    if not torch.equal(call(back, angles, turned, rope_cache_write).flip(0), together):
        return False
    again = turned if mine.table is not None else Cache(turned.k.flip(0), turned.v.flip(0), None)
    if not (torch.equal(again.k, mine.k) and torch.equal(again.v, mine.v)):
        return False
    depth = None if case.depth is None else case.depth[:, i:].contiguous() - i
    for b in range(0, len(one), 7):
        row = slice(b, b + 1)
        alone = Inputs(
            case.qkv[row, i:].contiguous(), case.lengths[row] + i, one[row],
            None if depth is None else depth[row], case.out,
        )  # fmt: skip
        some = theirs._replace(table=None if theirs.table is None else theirs.table[row])
        if theirs.table is None:
            some = Cache(theirs.k[row], theirs.v[row], None)
        if not torch.equal(call(alone, angles, some, rope_cache_write)[0, 0], together[b, i]):
            return False
        slot = int(case.lengths[b]) + i
        page, at = (b, slot) if mine.table is None else (
            int(mine.table[b, slot // PAGE]), slot % PAGE)  # fmt: skip
        for x, y in ((mine.k, theirs.k), (mine.v, theirs.v)):
            if not torch.equal(x[page, at], y[page, at]):
                return False
    return True


def bytes_moved(model: str, batch: int, rows: int, tree: bool, paged: bool) -> int:
    """The projection read; q, k and v written; a row of cos and of sin in float32; int32 inputs."""
    heads, kv_heads, size = MODELS[model]
    numbers = 2 * (heads + 2 * kv_heads) * size
    return batch * (rows * (2 * numbers + 4 * size + 4 * tree + 4 * paged) + 4 * 2)


def composed(case: Inputs, angles: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
    """The same of PyTorch's own ops, every row alive."""
    batch, rows, _ = case.qkv.shape
    heads, size = case.out.shape[2:]
    kv_heads = cache.k.shape[2]
    step = torch.arange(rows, device="cuda", dtype=torch.int32)
    slot = (case.lengths[:, None] + step).long()
    at = slot if case.depth is None else (case.lengths[:, None] + case.depth).long()
    cos, sin = (x[at][:, :, None] for x in angles)
    x, v = case.qkv.view(batch, rows, -1, size).split([heads + kv_heads, kv_heads], dim=2)
    a, b = x.float().chunk(2, dim=-1)
    x = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(v.dtype)
    page = torch.arange(batch, device="cuda")[:, None]
    if cache.table is not None:
        page, slot = cache.table.gather(1, slot // PAGE).long(), slot % PAGE
    cache.k[page, slot] = x[:, :, heads:]
    cache.v[page, slot] = v
    return x[:, :, :heads]


def main() -> None:
    """Measure, print and write `rope_cache_write.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("rope_cache_write is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    results: list[dict[str, Any]] = []
    for model, batch, rows, tree in CASES:
        heads, kv_heads, size = MODELS[model]
        angle = torch.rand(SLOTS, size // 2, device="cuda") * 6
        angles = angle.cos(), angle.sin()
        for paged in (False, True):
            moved = bytes_moved(model, batch, rows, tree, paged)
            cache = new_cache(model, batch, paged)
            sets = [inputs(model, batch, rows, tree, n) for n in range(input_sets(moved, "cuda"))]
            equal = all(equals_the_reference(case, angles, cache) for case in sets[:2])
            invariant = rows_are_equal(sets[0], angles, cache)
            contenders: dict[str, list[Call]] = {
                "us": [
                    lambda s=s, a=angles, c=cache: call(s, a, c, rope_cache_write, out=s.out)
                    for s in sets
                ],
                "composed": [lambda s=s, a=angles, c=cache: composed(s, a, c) for s in sets],
                "empty": empty_launches(),
            }
            times = measure(contenders, "cuda", quick=args.quick)
            ours, empty = times["us"], times["empty"].us
            results.append({
                "shape": model, "Hq": heads, "Hkv": kv_heads, "D": size, "B": batch, "T": rows,
                "S": SLOTS, "dtype": "bfloat16", "draft": "tree" if tree else "linear",
                "cache": "paged" if paged else "contiguous", **ours.row(),
                "us_empty": round(empty, 3), "us_over_empty": round(ours.us - empty, 3),
                "bytes": moved, "ceiling": "copy",
                "ceiling_share": round(moved / bandwidth / ours.us, 4),
                "us_composed": round(times["composed"].us, 3),
                "x_composed": round(ours.us / times["composed"].us, 4),
                "bytes_equal": equal, "rows_equal": invariant,
            })  # fmt: skip
            del cache, sets, contenders
    print_table(results)
    print(f"copy, read and written: {bandwidth * 1e-6:.3f} TB/s")
    print(write_results("rope_cache_write", results, out=args.out))


if __name__ == "__main__":
    main()
