"""Norm, LM head, top-k and logsumexp in one op, beside the bare product of the head (cuBLAS).

bf16, weights rotated past three times the L2. `us` and `x_linear` are of calls that nothing
overlaps: before each, ours and cuBLAS's alike, an empty kernel runs to its end, and its time is
taken off. In a row: without it, so that a call's norm starts under the end of the call before, as
it would behind another op of this package. Composed: the same of PyTorch's own ops.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as cublas
from torch.nn.functional import rms_norm

from bench.empty_kernel import empty_launches
from bench.harness import Call, arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import reference
from eesd_kernels.exit_topk import exit_topk_op

SHAPES = [
    (32_000, 4_096), (32_000, 5_120), (32_000, 8_192), (128_256, 4_096), (128_256, 8_192),
    (151_936, 5_120),
]  # fmt: skip
CASES = [(8, 1), (8, 4), (8, 16), (8, 64)]  # k, rows
WIDE = [(64, 1), (64, 16)]
WIDE_SHAPES = [(32_000, 4_096), (128_256, 4_096), (151_936, 5_120)]
EPS = 1e-5
CHECKED = 16  # rows against float64
TOLERANCE = 6e-2  # of logits about 10 in size: a norm in bf16 may round its result once more
REPLAYS = 30

Results = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, std: float = 1.0) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_(0, std)


def composed(x: Tensor, weight: Tensor, k: int, norm: Tensor, eps: float) -> Any:
    """The same of PyTorch's own ops."""
    logits = cublas(rms_norm(x, norm.shape, norm, eps), weight).float()
    return logits.topk(k), logits.logsumexp(-1)


def bytes_moved(rows: int, vocab: int, size: int, k: int) -> int:
    """Weights and rows once; values, ids, logsumexp. Of the scratch, nothing is counted."""
    return 2 * (vocab * size + rows * size + size) + rows * (8 * k + 4)


def near_float64(got: Results, x: Tensor, weight: Tensor, norm: Tensor) -> None:
    """Each value is its id's, none better is left out, in order, and so is the normaliser."""
    hidden = reference.rms_norm(x[:CHECKED], norm, EPS).double()
    logits = torch.cat([hidden @ part.double().T for part in weight.split(8_192)], 1)
    values, ids, lse = (t[:CHECKED] for t in got)
    close = {"rtol": 0.0, "atol": TOLERANCE}
    torch.testing.assert_close(values.double(), logits.gather(1, ids.long()), **close)
    torch.testing.assert_close(values.double(), logits.topk(values.shape[1]).values, **close)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), **close)
    falls, ties = values[:, :-1] > values[:, 1:], values[:, :-1] == values[:, 1:]
    assert bool((falls | (ties & (ids[:, :-1] < ids[:, 1:]))).all())


def check(weight: Tensor, norm: Tensor, k: int, counts: list[int]) -> bool:
    """Against float64; whether a row has the same bits at every number of rows and place."""
    x = normal(2 * max(*counts, 64), weight.shape[1])
    together = exit_topk_op(x, weight, k, norm, EPS)
    near_float64(together, x, weight, norm)

    def same(rows: Any) -> bool:
        some = exit_topk_op(x[rows], weight, k, norm, EPS)
        return all(torch.equal(a, b[rows]) for a, b in zip(some, together, strict=True))

    runs = [slice(at, at + count) for count in counts for at in (0, 37)]
    return all(same(rows) for rows in [*runs, torch.randperm(x.shape[0], device="cuda")])


def main() -> None:
    """Measure, print and write `exit_topk.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("exit_topk is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth, empty = read_bandwidth(), empty_launches()[0]
    rows: list[dict[str, Any]] = []
    for vocab, size in SHAPES:
        sets = input_sets(2 * vocab * size, "cuda")
        weights = [normal(vocab, size, std=3 * size**-0.5) for _ in range(sets)]
        norm = 1 + normal(size, std=0.3)
        cases = CASES + (WIDE if (vocab, size) in WIDE_SHAPES else [])
        equal = {
            k: check(weights[0], norm, k, [count for kept, count in cases if kept == k])
            for k in {kept for kept, _ in cases}
        }
        for k, count in cases:
            inputs = [(normal(count, size), weight, k, norm, EPS) for weight in weights]
            contenders: dict[str, list[Call]] = {
                "us": [lambda x=x: (empty(), exit_topk_op(*x)) for x in inputs],
                "linear": [lambda x=x: (empty(), cublas(*x[:2])) for x in inputs],
                "in_a_row": [lambda x=x: exit_topk_op(*x) for x in inputs],
                "linear_in_a_row": [lambda x=x: cublas(*x[:2]) for x in inputs],
                "composed": [lambda x=x: composed(*x) for x in inputs],
                "empty": [empty],
            }
            times = measure(contenders, "cuda", quick=args.quick, replays=REPLAYS)
            nothing = times["empty"].us
            ours = {name: round(us - nothing, 3) for name, us in times["us"].row().items()}
            linear = times["linear"].us - nothing
            moved = bytes_moved(count, vocab, size, k)
            rows.append({
                "V": vocab, "H": size, "R": count, "k": k, "dtype": "bfloat16", **ours,
                "bytes": moved, "ceiling_share": round(moved / bandwidth / ours["us"], 4),
                "us_linear": round(linear, 3), "x_linear": round(ours["us"] / linear, 4),
                "us_in_a_row": round(times["in_a_row"].us, 3),
                "x_linear_in_a_row": round(times["in_a_row"].us / times["linear_in_a_row"].us, 4),
                "us_composed": round(times["composed"].us, 3),
                "x_composed": round(ours["us"] / times["composed"].us, 4),
                "rows_equal": equal[k],
            })  # fmt: skip
        del weights, inputs
    print_table(rows)
    print(f"read bandwidth {bandwidth * 1e-6:.3f} TB/s")
    for k, count in CASES + WIDE:
        ratios = [float(r["x_linear"]) for r in rows if (r["k"], r["R"]) == (k, count)]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"x_linear, geometric mean of {len(ratios)} heads, k {k}, R {count}: {mean:.4f}")
    print(write_results("exit_topk", rows, out=args.out))


if __name__ == "__main__":
    main()
