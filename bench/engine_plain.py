"""Plain decoding in the engine against the bytes it must read: `floor_share`, batch 1.

A synthetic model of a named shape (random weights), bfloat16, with so many tokens of context. The
floor is the weights and the live K and V over the read bandwidth measured in the same run.
"""

import argparse
import statistics
from pathlib import Path

import torch

import eesd
from bench.engine import Clock, Floor
from bench.harness import print_table, read_bandwidth
from bench.results import write_results


def main() -> None:
    """Measure and write `engine_plain.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-2-13b"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    rows = []
    for shape in args.shapes:
        model = eesd.synthetic(shape, agreement=1.0, exit_layer=1, device="cuda")
        rows.append(measure(model, shape, args, bandwidth))
        print_table(rows[-1:])
        write_results("engine_plain", rows, out=args.out)
        del model


def measure(
    model: eesd.Model, shape: str, args: argparse.Namespace, bandwidth: float
) -> dict[str, object]:
    """One shape: the median round of some calls."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(
        3, model.config.vocab_size, (1, args.context), generator=generator, device="cuda"
    )
    gaps: list[float] = []
    for repeat in range(args.repeats + 1):
        clock = Clock()
        eesd.generate(
            model, ids, max_new_tokens=args.new_tokens, num_assistant_tokens=0,
            eos_token_id=(), streamer=clock,
        )  # fmt: skip
        if repeat:  # the first captures graphs
            gaps += [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)]
    us = statistics.median(gaps) * 1e6
    floor = Floor.of(model, None).round(0, args.context + args.new_tokens // 2)
    fifths = statistics.quantiles(gaps, n=5)
    return {
        "shape": shape,
        "dtype": "bfloat16",
        "mode": "greedy",
        "weights": "synthetic",
        "B": 1,
        "S": args.context,
        "new_tokens": args.new_tokens,
        "us": round(us, 1),
        "us_p20": round(fifths[0] * 1e6, 1),
        "us_p80": round(fifths[3] * 1e6, 1),
        "tokens_per_s": round(1e6 / us, 2),
        "bytes": floor,
        "read_gb_s": round(bandwidth / 1e3, 1),
        "floor_us": round(floor / bandwidth, 1),
        "floor_share": round(floor / bandwidth / us, 4),
    }


if __name__ == "__main__":
    main()
