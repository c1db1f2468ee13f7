"""Plain decoding in the engine against the bytes it must read: `floor_share`, batch 1.

A synthetic model of a named shape (random weights), bfloat16, with so many tokens of context. The
floor is the weights and the live K and V over the read bandwidth measured in the same run.
"""

import argparse
import statistics

import torch

import eesd
from bench.engine import (
    Clock,
    Floor,
    bandwidth,
    engine_arguments,
    prepare,
    random_prompts,
    syncs_per_round,
    synthetic,
)
from bench.harness import print_table
from bench.results import write_results

KEY = ("shape", "B", "S", "new_tokens")


def main() -> None:
    """Measure and write `engine_plain.json`."""
    parser = engine_arguments(__doc__.splitlines()[0], "llama-2-13b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prepare(args)
    row = measure(synthetic(args, 1.0, 1), args, bandwidth(args.device))
    print_table([row])
    write_results("engine_plain", [row], out=args.out, key=KEY)


@torch.inference_mode()
def measure(model: eesd.Model, args: argparse.Namespace, reads: float) -> dict[str, object]:
    """One shape: the median round of some calls."""
    ids = random_prompts(model, [args.context], 0)[0][None]

    def call(tokens: int, **options: object) -> eesd.GenerateOutput:
        return eesd.generate(
            model, ids, max_new_tokens=tokens, num_assistant_tokens=0, eos_token_id=(),
            return_dict_in_generate=True, **options,
        )  # fmt: skip

    first = call(args.new_tokens).speculative.engine  # which captures
    gaps: list[float] = []
    for _ in range(args.repeats):
        clock = Clock()
        call(args.new_tokens, streamer=clock)
        gaps += [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)]
    us = statistics.median(gaps) * 1e6
    floor = Floor.of(model, None).round(0, args.context + args.new_tokens // 2)
    fifths = statistics.quantiles(gaps, n=5)
    return {
        "shape": args.shape,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
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
        "read_gb_s": round(reads / 1e3, 1),
        "floor_us": round(floor / reads, 1),
        "floor_share": round(floor / reads / us, 4),
        "syncs_per_round": round(syncs_per_round(call, 8, 24), 3),
        "captured": first.captured,
        "capture_s": round(first.capture_s, 2),
        "capture_mib": round(first.capture_bytes / 2**20),
        "cache_mib": round(first.cache_bytes / 2**20),
    }


if __name__ == "__main__":
    main()
