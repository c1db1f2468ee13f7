"""A million Beta samples: ours, PyTorch's and, on the CPU, numpy's.

CPU: one thread, float32 (numpy: float64, it has no other); the public function, its check of the
parameters included, beside `torch.distributions.Beta.sample` and `Generator.beta`. GPU: CUDA-graph
replays beside `torch._sample_dirichlet`, the kernel under PyTorch's Beta.
"""

import numpy as np
import torch
from torch import Tensor

from bench.harness import arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import reference, sample_beta

N = 1_000_000
SHAPES = [(2.0, 5.0), (50.0, 30.0), (0.5, 0.5)]
LAYOUTS = [(1000, 1000), (N, 1)]  # sequences x buckets


def bytes_moved(rows: int, buckets: int) -> int:
    """alpha, beta and out float32 a sample; seed int64 and position int32 a row."""
    return 3 * 4 * rows * buckets + (8 + 4) * rows


def inputs(alpha: float, beta: float, layout: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    """alpha, beta, seed, position."""
    rows, buckets = layout
    shape = torch.ones(rows, buckets, device=device)
    row = torch.arange(rows, device=device)
    return shape * alpha, shape * beta, row // 64, (row % 64).to(torch.int32)


def check(device: str) -> None:
    """The op against its reference, on other shapes too."""
    g = torch.Generator().manual_seed(0)
    alpha, beta = torch.rand(2, 500, 8, generator=g) * 9 + 0.05
    key = torch.arange(500), torch.arange(500, dtype=torch.int32)
    got = sample_beta(*(x.to(device) for x in (alpha, beta, *key))).cpu()
    want = reference.sample_beta(alpha, beta, *key)
    # float32 against float64; a draw whose acceptance hangs on the last bits may differ.
    assert ((got - want).abs() > 1e-5).sum() <= 1, "sample_beta differs from its reference"


def main() -> None:
    """Measure, print and write `sample_beta.json`."""
    args = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    check(args.device)
    bandwidth = read_bandwidth() if args.device == "cuda" else None
    rows = []
    for alpha, beta in SHAPES:
        for layout in LAYOUTS:
            moved = bytes_moved(*layout)
            sets = [
                inputs(alpha, beta, layout, args.device)
                for _ in range(input_sets(moved, args.device))
            ]
            contenders = {"us": [lambda s=s: sample_beta(*s) for s in sets]}
            if args.device == "cuda":
                pairs = [torch.stack((s[0].flatten(), s[1].flatten()), -1) for s in sets]
                contenders["torch"] = [lambda p=p: torch._sample_dirichlet(p) for p in pairs]
            else:
                a, b, *_ = sets[0]
                law, rng = (
                    torch.distributions.Beta(a, b, validate_args=False),
                    np.random.default_rng(1),
                )
                contenders["torch"] = [law.sample]
                contenders["numpy"] = [lambda a=alpha, b=beta, rng=rng: rng.beta(a, b, N)]
            times = measure(contenders, args.device, quick=args.quick)
            ours = times.pop("us")
            row = {
                "alpha": alpha, "beta": beta, "n": N, "shape": f"{layout[0]}x{layout[1]}",
                "dtype": "float32", "device": args.device, **ours.row(), "bytes": moved,
                "ceiling_share": round(moved / ours.us / bandwidth, 3) if bandwidth else None,
                **{f"us_{name}": round(t.us, 3) for name, t in times.items()},
                **{f"x_{name}": round(ours.us / t.us, 4) for name, t in times.items()},
            }  # fmt: skip
            rows.append(row)
    print_table(rows)
    on = "cpu" if args.device == "cpu" else None
    print(write_results("sample_beta", rows, out=args.out, on=on))


if __name__ == "__main__":
    main()
