"""The rollback of a tree draft, all layers in one launch: at batch 1 beside an empty kernel, at
large batches beside a copy.

bf16. Paths of trees of 32 nodes, of which the same number of tokens moves in each sequence (0: a
line of six). Sets differ in lengths, and so in the slots that they touch: these rotate past three
times the L2 where 64 sets reach that. Composed PyTorch gathers and scatters the same tokens over
indices that the host has made beforehand. `us_apart`: a call behind an empty kernel that runs to
its end, less that kernel's time.
"""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.empty_kernel import empty_launches
from bench.harness import Call, arguments, copy_bandwidth, input_sets, measure, print_table
from bench.results import write_results
from eesd_kernels import reference, rollback_kv

NODES = 32
PAGE = 16
MODELS = {"13b": (40, 40, 128), "70b": (80, 8, 128)}  # layers, KV heads, head size
CASES = [
    *(("13b", 1, moved) for moved in range(6)), ("70b", 1, 5),
    *(("13b", batch, moved) for batch in (64, 256) for moved in (0, 1, 5)),
    *(("70b", batch, 5) for batch in (64, 256)),
]  # fmt: skip
SLOTS = {1: 2048, 64: 256, 256: 96}  # by batch: of a sequence


class Inputs(NamedTuple):
    """One set; the cache is that of all sets."""

    path: Tensor
    lengths: Tensor
    table: Tensor | None
    source: Tensor  # for composed PyTorch: tokens of the flattened cache
    target: Tensor
    out: Tensor


def new_cache(model: str, batch: int, paged: bool) -> tuple[Tensor, Tensor | None]:
    """Random bytes; the pages of the sequences in random order, and their table."""
    layers, heads, size = MODELS[model]
    slots = SLOTS[batch]
    shape = (batch * slots // PAGE, PAGE) if paged else (batch, slots)
    cache = torch.empty(layers, 2, *shape, heads, size, dtype=torch.int16, device="cuda").random_()
    table = torch.randperm(shape[0], device="cuda").int().view(batch, -1) if paged else None
    return cache.view(torch.bfloat16), table


def inputs(batch: int, moved: int, table: Tensor | None, number: int) -> Inputs:
    rng, slots = random.Random(number), SLOTS[batch]
    paths, lengths, source, target = [], [], [], []
    for b in range(batch):
        path = list(range(6)) if not moved else [0, *sorted(rng.sample(range(2, NODES), moved))]
        at = (number * batch + b) * NODES % (slots - NODES + 1)
        lengths.append(at)
        paths.append(path + [-1] * (NODES - len(path)))
        moves = [(node, d) for d, node in enumerate(path) if node > d]
        source += [b * slots + at + node for node, _ in moves]
        target += [b * slots + at + d for _, d in moves]

    def token(places: list[int]) -> Tensor:
        place = torch.tensor(places, device="cuda", dtype=torch.long)
        if table is None:
            return place
        return table.view(-1)[place // PAGE].long() * PAGE + place % PAGE

    length = torch.tensor(lengths, device="cuda").int()
    path_ids = torch.tensor(paths, device="cuda").int()
    return Inputs(path_ids, length, table, token(source), token(target), torch.empty_like(length))


def equals_the_reference(cache: Tensor, case: Inputs) -> bool:
    """Every byte of the cache, and the lengths."""
    want, got = cache.clone(), cache.clone()
    lengths = reference.rollback_kv(want, case.path, case.lengths, case.table)
    rollback_kv(got, case.path, case.lengths, block_table=case.table, out=case.out)
    same = torch.equal(case.out, lengths)
    return same and torch.equal(got.view(torch.int16), want.view(torch.int16))


def overlapping(batch: int, table: Tensor | None) -> Inputs:
    """Up to 24 moved tokens a sequence, most of them from slots that others move to, over pages."""
    rng, paths = random.Random(0), []
    for b in range(batch):
        path = [0, *sorted(rng.sample(range(2, NODES), 24 - b % 8))]
        paths.append(path + [-1] * (NODES - len(path)))
    length = torch.arange(batch, device="cuda").int() * 5 % 40 + 13
    path_ids, none = torch.tensor(paths, device="cuda").int(), torch.empty(0, device="cuda")
    return Inputs(path_ids, length, table, none, none, torch.empty_like(length))


def bytes_moved(model: str, batch: int, moved: int, paged: bool) -> int:
    """K and V of the moved tokens, read and written; paths, lengths in and out, pages' numbers."""
    layers, heads, size = MODELS[model]
    tokens = 2 * 2 * layers * moved * heads * size * 2
    return batch * (tokens + 4 * NODES + 4 * 2 + (4 * 2 * moved if paged else 0))


def composed(cache: Tensor, case: Inputs) -> Tensor:
    """PyTorch's own gather and scatter."""
    flat = cache.flatten(2, 3)
    return flat.index_copy_(2, case.target, flat.index_select(2, case.source))


def main() -> None:
    """Measure, print and write `rollback_kv.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("rollback_kv is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for model, batch, moved in CASES:
        for paged in (False, True):
            bytes_each = bytes_moved(model, batch, moved, paged)
            cache, table = new_cache(model, batch, paged)
            sets = [inputs(batch, moved, table, n) for n in range(input_sets(bytes_each, "cuda"))]
            checked = [*sets[:2], overlapping(batch, table)]
            equal = all(equals_the_reference(cache, case) for case in checked)
            contenders: dict[str, list[Call]] = {
                "us": [
                    lambda s=s, cache=cache: rollback_kv(
                        cache, s.path, s.lengths, block_table=s.table, out=s.out
                    )
                    for s in sets
                ],
                "empty": empty_launches(),
            }
            empty_call = contenders["empty"][0]
            contenders["apart"] = [
                lambda c=c, e=empty_call: (e(), c()) for c in contenders["us"]
            ]  # fmt: skip
            if moved:
                contenders["composed"] = [lambda s=s, cache=cache: composed(cache, s) for s in sets]
            times = measure(contenders, "cuda", quick=args.quick)
            ours, empty = times["us"], times["empty"].us
            layers, heads, size = MODELS[model]
            rows.append({
                "shape": model, "layers": layers, "Hkv": heads, "D": size, "B": batch, "T": NODES,
                "S": SLOTS[batch], "dtype": "bfloat16", "cache": "paged" if paged else "contiguous",
                "moved": moved, **ours.row(), "us_empty": round(empty, 3),
                "us_over_empty": round(ours.us - empty, 3),
                "us_apart": round(times["apart"].us - empty, 3), "bytes": bytes_each,
                **({
                    "ceiling": "copy", "ceiling_share": round(bytes_each / bandwidth / ours.us, 4),
                    "us_composed": round(times["composed"].us, 3),
                    "x_composed": round(ours.us / times["composed"].us, 4),
                } if moved else {}),
                "bytes_equal": equal,
            })  # fmt: skip
            del cache, sets, contenders
    print_table(rows)
    print(f"copy, read and written: {bandwidth * 1e-6:.3f} TB/s")
    print(write_results("rollback_kv", rows, out=args.out))


if __name__ == "__main__":
    main()
