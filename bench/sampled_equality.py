"""Sampled ids under the coupled law against plain sampling's with the same seed, prompt by prompt.

Each prompt has one seed. For every temperature and top-p it is decoded plainly once, in a batch;
then with drafts in that batch, and two prompts of each batch alone. Schedule and longest draft
change from case to case, so that all pairs come. In float64 all must be equal. A float32 mismatch
is printed with the gap that decided there: between the two best of `log p - log E`, the race that
both modes run. Only near-ties may differ; exits with 1 otherwise.
"""

import argparse
import functools
import itertools
import multiprocessing
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eesd
from bench.prompts import add_data_argument, left_padded, load_prompts
from bench.results import write_results
from eesd.cli.compare import plain_logits
from eesd_kernels import _C
from eesd_kernels.laws import Purpose
from eesd_kernels.reference.philox import philox_words, race_exponential
from eesd_kernels.reference.target_law import target_law

NEAR_TIE = 1e-4
PART = 8
SCHEDULES = ("thompson", "calibrated", "bernoulli", "constant")
DRAFTS = (1, 3, 8)
Case = tuple[str, float, float]
Key = tuple[str, float, float, str, int, int]  # and schedule, K, B


def main() -> None:
    """Run, print mismatches, write `sampled_equality.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--set", default="gsm8k_test")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=10)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0, 0.9])
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    count = len(_prompts(args.model, "float32", args.data, args.set, args.new_tokens))
    count = min(count, args.prompts)
    texts: dict[Key, int] = defaultdict(int)
    gaps: dict[Key, list[float]] = defaultdict(list)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=_one_thread) as pool:
        cases = itertools.product(args.dtypes, args.temperatures, args.top_p)
        batches = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
        parts = [
            pool.submit(_part, args, case, batch, turn)
            for turn, (case, batch) in enumerate(itertools.product(cases, batches))
        ]
        for done, part in enumerate(as_completed(parts), 1):
            for key, found in part.result():
                texts[key] += 1
                gaps[key] += found
            print(f"{done} of {len(parts)} parts", end="\r", flush=True)
    rows = [
        {
            "dataset": args.set,
            "mode": "sampled",
            "law": "coupled",
            "dtype": dtype,
            "temperature": temperature,
            "top_p": top_p,
            "schedule": "default" if schedule == "thompson" else schedule,
            "K": drafts,
            "B": batch,
            "prompts": texts[key],
            "new_tokens": args.new_tokens,
            "ids_equal": not gaps[key],
            "mismatches": len(gaps[key]),
            "largest_gap": max(gaps[key], default=None),
        }
        for key in sorted(texts)
        for dtype, temperature, top_p, schedule, drafts, batch in [key]
    ]
    for dtype in args.dtypes:
        of = [row for row in rows if row["dtype"] == dtype]
        wrong = [gap for key, found in gaps.items() if key[0] == dtype for gap in found]
        total = sum(row["prompts"] for row in of)
        print(f"{dtype}: {len(wrong)} of {total} texts differ; gaps {sorted(wrong)}")
    print(write_results("sampled_equality", rows, out=args.out, on="cpu"))
    far = sum(gap > NEAR_TIE or key[0] == "float64" for key in gaps for gap in gaps[key])
    if far:
        raise SystemExit(f"{far} mismatches beyond a near-tie")


def _one_thread() -> None:
    torch.set_num_threads(1)
    _C.set_num_threads(1)


@functools.cache
def _model(name: str, dtype: str) -> eesd.Model:
    return eesd.load(name, device="cpu", dtype=dtype)


@functools.cache
def _prompts(model: str, dtype: str, data: Path, name: str, new_tokens: int) -> list[Tensor]:
    return load_prompts(data, name, _model(model, dtype), new_tokens)


def _part(
    args: argparse.Namespace, case: Case, part: range, turn: int
) -> list[tuple[Key, list[float]]]:
    """For each text that was compared its case, and the gap where it differs."""
    dtype, temperature, top_p = case
    prompts = _prompts(args.model, dtype, args.data, args.set, args.new_tokens)
    some, model = [prompts[i] for i in part], _model(args.model, dtype)
    rule = {"temperature": temperature, "top_p": top_p}

    def text(ids: Tensor, seeds: list[int], mask: Tensor | None = None, **changes: Any) -> Tensor:
        out = eesd.generate(
            model, ids, mask, do_sample=True, seed=seeds, max_new_tokens=args.new_tokens,
            pad_token_id=0, assistant_sampling="coupled", **rule, **changes,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        new = out[:, ids.shape[1] :]
        return torch.nn.functional.pad(new, (0, args.new_tokens - new.shape[1]))

    ids, mask = left_padded(some)
    plain = text(ids, list(part), mask, num_assistant_tokens=0)
    found: list[tuple[Key, list[float]]] = []

    def compare(i: int, got: Tensor, schedule: str, drafts: int, batch: int) -> None:
        prompt, want, gaps = some[i - part.start], plain[i - part.start, None], []
        if not torch.equal(got, want):
            at = int((got != want).nonzero()[0, 1])
            gaps = [race_gap(model, torch.cat((prompt, want[0, :at])), i, temperature, top_p)]
            print(f"  prompt {i}, token {at}, {schedule} {drafts}: gap {gaps[0]:.2e}", flush=True)
        found.append(((dtype, temperature, top_p, schedule, drafts, batch), gaps))

    def drafting(turn: int) -> tuple[dict[str, Any], str, int]:
        schedule, drafts = SCHEDULES[turn % len(SCHEDULES)], DRAFTS[turn % len(DRAFTS)]
        names = {"num_assistant_tokens_schedule": schedule, "num_assistant_tokens": drafts}
        return names, schedule, drafts

    options, schedule, drafts = drafting(turn)
    for i, row in zip(part, text(ids, list(part), mask, **options), strict=True):
        compare(i, row[None], schedule, drafts, len(some))
    for lone in (2 * turn, 2 * turn + 1):
        options, schedule, drafts = drafting(lone)
        at = lone % len(some)
        got = text(some[at][None], [part[at]], **options)
        compare(part[at], got, schedule, drafts, 1)
    return found


def race_gap(
    model: eesd.Model, prefix: Tensor, seed: int, temperature: float, top_p: float
) -> float:
    """Between the two best of `log p - log E` behind a prefix `[n]`, for the token at n."""
    p = target_law(plain_logits(model, prefix), temperature, top_p=top_p)
    assert p is not None
    key = torch.tensor([seed]), torch.tensor([len(prefix)], dtype=torch.int32)
    words = philox_words(*key, torch.zeros_like(key[1]), Purpose.TARGET, p.numel())[0]
    best = (p.log() - race_exponential(words).log()).topk(2).values
    return float(best[0] - best[1])


if __name__ == "__main__":
    main()
