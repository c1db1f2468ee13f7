"""Acceptance of sampled drafts under rejection, coupled and block verification.

The same prompts, seeds and draft length under each law; the text's law is that of plain sampling
under all of them. A rate is accepted over drafted tokens, its standard error over texts (a ratio of
sums). `accepted_given_before` holds, for each place in a draft, the share accepted of the tokens
before which all were. Block verification runs in Python on the CPU, so no times are given.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eesd
from bench.prompts import add_data_argument, left_padded, load_prompts
from bench.results import write_results
from eesd_kernels import _C

LAWS = ("rejection", "coupled", "block")
BATCH = 8
Steps = tuple[list[int], list[int]]  # drafted and accepted of a text's rounds


def main() -> None:
    """Run, print a table, write `laws.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--sets", nargs="+", default=["gsm8k_test", "humaneval", "mt_bench", "alpaca_seed_tasks"]
    )
    parser.add_argument("--texts", type=int, default=96, help="a set and law; prompts come again")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7])
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    cases = list(itertools.product(args.sets, args.temperatures, LAWS))
    steps: dict[tuple[str, float, str], list[Steps]] = {case: [] for case in cases}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=_one_thread) as pool:
        parts = {
            pool.submit(_part, args, *case, range(first, min(first + BATCH, args.texts))): case
            for case in cases
            for first in range(0, args.texts, BATCH)
        }
        for done, part in enumerate(as_completed(parts), 1):
            steps[parts[part]] += part.result()
            print(f"{done} of {len(parts)} parts", end="\r", flush=True)
    rows = [_row(args, *case, steps[case]) for case in cases]
    head = f"{'set':<20} {'T':>4} {'law':<10} {'tokens a round':>15} {'accepted':>17}  by place"
    print(head)
    for row in rows:
        by_place = " ".join(f"{share:.3f}" for share in row["accepted_given_before"])
        print(
            f"{row['dataset']:<20} {row['temperature']:>4} {row['law']:<10} "
            f"{row['mean_acceptance_length']:>15.3f} {row['draft_acceptance_rate']:>8.4f} "
            f"+- {row['standard_error']:.4f}  {by_place}"
        )
    print(write_results("laws", rows, out=args.out, on="cpu"))


def _one_thread() -> None:
    torch.set_num_threads(1)
    _C.set_num_threads(1)


@functools.cache
def _model(name: str) -> eesd.Model:
    return eesd.load(name, device="cpu")


@functools.cache
def _prompts(model: str, data: Path, name: str, new_tokens: int) -> list[Tensor]:
    return load_prompts(data, name, _model(model), new_tokens)


def _part(
    args: argparse.Namespace, name: str, temperature: float, law: str, texts: range
) -> list[Steps]:
    """Text t continues prompt t modulo their number, with seed t."""
    model = _model(args.model)
    prompts = _prompts(args.model, args.data, name, args.new_tokens)
    ids, mask = left_padded([prompts[t % len(prompts)] for t in texts])
    out = eesd.generate(
        model, ids, mask, do_sample=True, temperature=temperature, seed=list(texts),
        max_new_tokens=args.new_tokens, num_assistant_tokens=args.drafts,
        num_assistant_tokens_schedule="constant", assistant_sampling=law,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out, eesd.GenerateOutput)
    stats = out.speculative
    return list(zip(stats.per_step_drafted, stats.per_step_accepted, strict=True))


def _row(
    args: argparse.Namespace, name: str, temperature: float, law: str, steps: list[Steps]
) -> dict[str, Any]:
    rounds = [pair for text in steps for pair in zip(*text, strict=True)]
    drafted, accepted = (sum(column) for column in zip(*rounds, strict=True))
    rate = accepted / drafted
    residuals = [sum(text[1]) - rate * sum(text[0]) for text in steps]
    n = len(steps)
    error = math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / drafted
    reached = [sum(l > j and m >= j for l, m in rounds) for j in range(args.drafts)]  # noqa: E741
    passed = [sum(l > j and m > j for l, m in rounds) for j in range(args.drafts)]  # noqa: E741
    return {
        "dataset": name,
        "mode": "sampled",
        "schedule": "constant",
        "law": law,
        "temperature": temperature,
        "K": args.drafts,
        "B": BATCH,
        "texts": n,
        "new_tokens": args.new_tokens,
        "rounds": len(rounds),
        "drafted": drafted,
        "mean_acceptance_length": 1 + accepted / len(rounds),
        "draft_acceptance_rate": rate,
        "standard_error": error,
        "accepted_given_before": [
            p / r if r else None for p, r in zip(passed, reached, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
