"""Greedy ids of EESD against plain decoding's, prompt by prompt.

In float64 all must be equal. In float32 a mismatch is printed with the gap between the two best
logits where the texts part: only near-ties may differ. Exits with 1 otherwise. The work is cut
into parts that run in `--jobs` processes of one thread each.
"""

import argparse
import functools
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

import eesd
from bench.prompts import add_data_argument, left_padded, load_prompts
from bench.results import write_results
from eesd.cli.compare import plain_logits
from eesd_kernels import _C

NEAR_TIE = 1e-5
PART = 24


def main() -> None:
    """Run, print mismatches, write `greedy_equality.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sets", nargs="+", default=["gsm8k_test", "humaneval"])
    parser.add_argument("--prompts", type=int, help="at most so many a set (all)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--schedule", default="thompson")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    cases = list(itertools.product(args.dtypes, args.sets, args.batches))
    gaps: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    counts = {
        name: len(_prompts(args.model, "float32", args.data, name, args.new_tokens)[: args.prompts])
        for name in args.sets
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=_one_thread) as pool:
        parts = {
            pool.submit(_part, args, *case, slice(first, min(first + PART, counts[case[1]]))): case
            for case in cases
            for first in range(0, counts[case[1]], PART)
        }
        for done, part in enumerate(as_completed(parts), 1):
            gaps[parts[part]] += part.result()
            print(f"{done} of {len(parts)} parts", end="\r", flush=True)
    rows = [
        {
            "dataset": name,
            "mode": "greedy",
            "schedule": "default" if args.schedule == "thompson" else args.schedule,
            "dtype": dtype,
            "B": batch,
            "prompts": counts[name],
            "new_tokens": args.new_tokens,
            "ids_equal": not found,
            "mismatches": len(found),
            "largest_gap": max(found, default=None),
        }
        for (dtype, name, batch), found in gaps.items()
    ]
    for row in rows:
        print(row)
    print(write_results("greedy_equality", rows, out=args.out, on="cpu"))
    wrong = sum(
        gap > NEAR_TIE or dtype == "float64" for (dtype, *_), found in gaps.items() for gap in found
    )
    if wrong:
        raise SystemExit(f"{wrong} mismatches beyond a near-tie")


def _one_thread() -> None:
    torch.set_num_threads(1)
    _C.set_num_threads(1)


@functools.cache
def _model(name: str, dtype: str) -> eesd.Model:
    return eesd.load(name, device="cpu", dtype=dtype)


@functools.cache
def _prompts(model: str, dtype: str, data: Path, name: str, new_tokens: int) -> list[Tensor]:
    return load_prompts(data, name, _model(model, dtype), new_tokens)


def _part(args: argparse.Namespace, dtype: str, name: str, batch: int, part: slice) -> list[float]:
    prompts = _prompts(args.model, dtype, args.data, name, args.new_tokens)[part]
    model = _model(args.model, dtype)
    return mismatches(model, prompts, batch, args.new_tokens, args.schedule)


def mismatches(
    model: eesd.Model, prompts: list[Tensor], batch: int, new_tokens: int, schedule: str
) -> list[float]:
    """Gaps between the two best logits at the first differing token of each unequal prompt."""
    gaps = []
    for first in range(0, len(prompts), batch):
        ids, mask = left_padded(prompts[first : first + batch])
        plain, fast = (
            eesd.generate(
                model,
                ids,
                mask,
                max_new_tokens=new_tokens,
                num_assistant_tokens=drafts,
                num_assistant_tokens_schedule=schedule,
            )
            for drafts in (0, 8)
        )
        width = max(plain.shape[1], fast.shape[1])
        pad = lambda x, width=width: torch.nn.functional.pad(x, (0, width - x.shape[1]))  # noqa: E731
        for row, (a, b) in enumerate(zip(pad(plain), pad(fast), strict=True)):
            if not torch.equal(a, b):
                at = int((a != b).nonzero()[0])
                gaps.append(_gap(model, a[:at][mask[row].argmax() :]))
                print(f"  prompt {first + row}, token {at}: gap {gaps[-1]:.2e}", flush=True)
    return gaps


def _gap(model: eesd.Model, ids: Tensor) -> float:
    """Between the two best logits behind a text."""
    best = plain_logits(model, ids).topk(2).values
    return float(best[0] - best[1])


if __name__ == "__main__":
    main()
