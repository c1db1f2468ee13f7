"""What the benches of the decoder's row by row kernels share: checks, contenders, results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.empty_kernel import empty_launches
from bench.harness import Call, copy_bandwidth, input_sets, measure, print_table
from bench.results import write_results

HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # relative
ROWS = (1, 8, 64, 200, 4096)
Op = Callable[..., Tensor]


def rows_are_equal(op: Op, x: Tensor, *others: Tensor) -> bool:
    """Whether rows have the same bits alone, as a block and in another order."""
    together = op(x, *others)
    count = x.shape[0]
    order = torch.randperm(count, device=x.device)
    some: list[Any] = [slice(i, i + 1) for i in {0, count // 2, count - 1}]
    return all(
        torch.equal(op(x[rows], *others), together[rows])
        for rows in [*some, slice(0, min(count, 6)), order]
    )


def main(
    name: str,
    cases: Sequence[dict[str, int]],
    inputs: Callable[..., tuple[Tensor, ...]],
    op: Op,
    reference: Op,
    torch_op: Op,
    args: Any,
) -> None:
    """Measure every case at every number of rows and in both halves; print and write `name`.json.

    Args:
        cases: fields of a row, which `inputs` takes.
        inputs: the op's arguments for a number of rows and a dtype, the rows' tensor first.
        op: takes `out` too. reference: in float64. torch_op: PyTorch's own.
    """
    if args.device != "cuda":
        print(f"{name} is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    results: list[dict[str, Any]] = []
    for case in cases:
        for dtype in HALVES:
            for count in ROWS:
                first = inputs(count, dtype, **case)
                got, want = op(*first), reference(*(x.double() for x in first))
                torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=1e-5)
                moved = sum(x.nbytes for x in (*first, got))
                sets = [first, *(inputs(count, dtype, **case) for _ in range(1, sets_of(moved)))]
                outs = [torch.empty_like(got) for _ in sets]
                contenders: dict[str, Sequence[Call]] = {
                    "us": [lambda s=s, o=o: op(*s, out=o) for s, o in zip(sets, outs, strict=True)],
                    "torch": [lambda s=s: torch_op(*s) for s in sets],
                    "empty": empty_launches(),
                }
                times = measure(contenders, "cuda", quick=args.quick, replays=20)
                ours = times["us"]
                results.append({
                    **case, "R": count, "dtype": str(dtype).removeprefix("torch."), **ours.row(),
                    "us_empty": round(times["empty"].us, 3), "bytes": moved, "ceiling": "copy",
                    "ceiling_share": round(moved / bandwidth / ours.us, 4),
                    "us_torch": round(times["torch"].us, 3),
                    "x_torch": round(ours.us / times["torch"].us, 4),
                    "rows_equal": rows_are_equal(op, *first),
                })  # fmt: skip
    print_table(results)
    print(f"copy, read and written: {bandwidth * 1e-6:.3f} TB/s")
    print(write_results(name, results, out=args.out))


def sets_of(moved: int) -> int:
    """Input sets; of a few rows no more than 16, which stay within the L2, as in a decoder."""
    return min(16, input_sets(moved, "cuda"))
