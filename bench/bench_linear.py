"""The row-invariant product of decoding against cuBLAS, on the shapes of LLaMA-2 and Llama-3.

bf16 and, at fewer numbers of rows, fp16; weights rotated past three times the L2. The fused forms
stand beside the same work composed of PyTorch's own ops. `rows_equal`: of 200 rows, runs of 1 to
192 have the bits that they have among all, from two places on, and so have all 200 in a random
order; `close`: 16 of them to float64.
"""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as cublas
from torch.nn.functional import rms_norm, silu

from bench.harness import Call, arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import reference
from eesd_kernels.linear import linear_op

SHAPES = [
    (15_360, 5_120), (5_120, 5_120), (27_648, 5_120), (5_120, 13_824),
    (10_240, 8_192), (8_192, 8_192), (57_344, 8_192), (8_192, 28_672),
]  # fmt: skip
HEADS = [(32_000, 5_120), (128_256, 8_192)]
OTHERS = [  # LLaMA-2 7B and 70B's head, Llama-3 8B
    (12_288, 4_096), (4_096, 4_096), (22_016, 4_096), (4_096, 11_008), (32_000, 4_096),
    (32_000, 8_192), (6_144, 4_096), (28_672, 4_096), (4_096, 14_336), (128_256, 4_096),
]  # fmt: skip
FUSED = [
    (15_360, 5_120, "norm"), (27_648, 5_120, "swiglu"), (27_648, 5_120, "norm swiglu"),
    (22_016, 4_096, "swiglu"), (28_672, 4_096, "norm swiglu"), (57_344, 8_192, "swiglu"),
    (5_120, 13_824, "residual"), (5_120, 5_120, "residual"), (4_096, 11_008, "residual"),
    (8_192, 28_672, "residual"),
]  # fmt: skip
ROWS = {torch.bfloat16: [1, 8, 16, 64], torch.float16: [1, 16]}
COUNTS = [1, 2, 6, 16, 17, 33, 64, 65, 192]
MOST = 200
EPS = 1e-5
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of results about one in size
OF_A_NORM = 2  # times that: its result is rounded too


def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").normal_(0, std)


def given(rows: int, weight: Tensor, form: str) -> tuple[Any, ...]:
    """The op's arguments."""
    (outs, columns), dtype = weight.shape, weight.dtype
    residual = normal(rows, outs, dtype=dtype) if "residual" in form else None
    norm_weight = normal(columns, dtype=dtype, std=0.1) + 1 if "norm" in form else None
    x = normal(rows, columns, dtype=dtype)
    return x, weight, residual, norm_weight, EPS, "swiglu" in form


def composed(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm: Tensor | None, eps: float, gated: bool
) -> Tensor:
    """The same of PyTorch's own ops."""
    if norm is not None:
        x = rms_norm(x, norm.shape, norm, eps)
    y = cublas(x, weight)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = silu(gate) * up
    return y if residual is None else y + residual


def bytes_moved(rows: int, outs: int, columns: int, form: str) -> int:
    """Weight, x and result once, and the residual and the norm's weight where there are any."""
    result = rows * outs // (2 if "swiglu" in form else 1)
    numbers = outs * columns + rows * columns + result
    return 2 * (numbers + result * ("residual" in form) + columns * ("norm" in form))


def check(weight: Tensor, form: str) -> tuple[bool, bool]:
    """Whether 16 rows are close to float64, and each has the same bits at every number of rows."""
    x, weight, residual, *rest = given(MOST, weight, form)
    together = linear_op(x, weight, residual, *rest)

    def of(rows: Any) -> Tensor:
        return linear_op(x[rows], weight, None if residual is None else residual[rows], *rest)

    some = slice(
        None, None, max(1, weight.shape[0] // 1000) if form == "plain" else 1
    )  # of the outputs
    parts = [x[:16], weight[some], None if residual is None else residual[:16], *rest]
    want = reference.linear(*(t.double() if isinstance(t, Tensor) else t for t in parts))
    limit = TOLERANCE[weight.dtype] * (OF_A_NORM if "norm" in form else 1)
    close = torch.allclose(together[:16, some].double(), want, rtol=limit, atol=limit)
    order = torch.randperm(x.shape[0], device=x.device)
    return close, torch.equal(of(order), together[order]) and all(
        torch.equal(of(slice(at, at + rows)), together[at : at + rows])
        for rows in COUNTS
        for at in (0, min(37, MOST - rows))
    )


def main() -> None:
    """Measure, print and write `linear.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("linear is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    rows = []
    plain = [(outs, columns, "plain") for outs, columns in SHAPES + HEADS + OTHERS]
    for (outs, columns, form), dtype in product([*plain, *FUSED], ROWS):
        sets = input_sets(2 * outs * columns, "cuda")
        weights = [normal(outs, columns, dtype=dtype, std=columns**-0.5) for _ in range(sets)]
        close, equal = check(weights[0], form)
        for count in ROWS[dtype]:
            inputs = [given(count, weight, form) for weight in weights]
            against = "linear" if form == "plain" else "composed"
            contenders: dict[str, list[Call]] = {
                "us": [lambda x=x: linear_op(*x) for x in inputs],
                against: [lambda x=x: composed(*x) for x in inputs],
            }
            times = measure(contenders, "cuda", quick=args.quick)
            moved = bytes_moved(count, outs, columns, form)
            rows.append({
                "O": outs, "H": columns, "R": count,
                "dtype": str(dtype).removeprefix("torch."), "form": form,
                **times["us"].row(), "bytes": moved,
                "ceiling_share": round(moved / bandwidth / times["us"].us, 4),
                f"us_{against}": round(times[against].us, 3),
                f"x_{against}": round(times["us"].us / times[against].us, 4),
                "rows_equal": equal, "close": close,
            })  # fmt: skip
        del weights, inputs
    print_table(rows)
    print(f"read bandwidth {bandwidth * 1e-6:.3f} TB/s")
    for name, shapes in (("eight shapes", SHAPES), ("with the heads", SHAPES + HEADS)):
        for dtype, counts in ROWS.items():
            for count in counts:
                ratios = [
                    float(r["x_linear"]) for r in rows
                    if r["R"] == count and r["form"] == "plain" and (r["O"], r["H"]) in shapes
                    and r["dtype"] == str(dtype).removeprefix("torch.")
                ]  # fmt: skip
                mean = geometric_mean(ratios)
                print(f"x_linear, geometric mean, {name}, {dtype}, R {count}: {mean:.4f}")
    print(write_results("linear", rows, out=args.out))


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


if __name__ == "__main__":
    main()
