"""Replay the controller's rules on recorded traces: what each would have cost.

A round of draft length l costs `1 + l r` plain steps, r the cost ratio of a draft step (half of it
the layers below N, half the exit); the trace says how many of the l would have been accepted.
`x_hindsight` is a rule's time per token over that of the best constant length, chosen for the set
in hindsight; `x_plain` over plain decoding's. The decisions are the package's own ops'.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import eesd
from bench.record_traces import TRACES
from bench.results import write_results
from eesd.controller import DEFAULT_DISCOUNT, PRIOR_WEIGHT, SCHEDULES
from eesd_kernels import Rule, thompson_draft_length, thompson_look, thompson_update

MAX_DRAFT = 8
BUCKETS = 8
CONSTANTS = range(MAX_DRAFT + 1)
DEFAULT = SCHEDULES["thompson"].name.lower()


@dataclass
class Replay:
    """One rule over the sequences of one set, side by side, each on its own.

    rank, top1: `[sequences, tokens]`. time and tokens: `[sequences]`, in plain steps and tokens.
    """

    rank: torch.Tensor
    top1: torch.Tensor
    ratio: float
    prior: tuple[float, float]
    discount: float
    time: torch.Tensor = field(init=False)
    history: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.costs = torch.arange(MAX_DRAFT + 1) * self.ratio + 1.0
        rows, tokens = self.rank.shape
        # run[b, i]: accepted drafts from token i on, if drafting never stopped
        self.run = torch.zeros(rows, tokens + 1, dtype=torch.int32)
        for i in range(tokens - 1, -1, -1):
            self.run[:, i] = torch.where(self.rank[:, i] == 0, self.run[:, i + 1] + 1, 0)

    def posterior(self, buckets: int | None = None) -> list[torch.Tensor]:
        """Fresh alpha, beta and their priors; a prior is split over its buckets."""
        shape = (len(self.rank),) if buckets is None else (len(self.rank), buckets)
        return [torch.full(shape, value / (buckets or 1)) for value in (*self.prior, *self.prior)]

    def replay(self, rule: Rule, length: int, seed: int, carried: list[torch.Tensor] | None):
        """Time per sequence `[sequences]` and the posterior afterwards."""
        rows, tokens = self.rank.shape
        calibrated = rule is Rule.CALIBRATED
        state = carried or self.posterior(BUCKETS if calibrated else None)
        at = torch.zeros(rows, dtype=torch.int32)
        time = torch.zeros(rows)
        seeds = torch.arange(rows) + 1_000_003 * seed
        while bool((at < tokens).any()):
            cap = torch.where(at < tokens, (tokens - at - 1).clamp(max=length), -1).to(torch.int32)
            bucket = None
            if calibrated:
                drafted, bucket, looks = self._look(state, cap, seeds, at)
            elif rule is Rule.COST:  # each sequence is a batch of its own here
                drafted = torch.cat(
                    [self._plan(rule, state, cap, seeds, at, slice(b, b + 1)) for b in range(rows)]
                )
                looks = drafted
            else:
                drafted = self._plan(rule, state, cap, seeds, at, slice(None))
                looks = drafted
            live = cap >= 0
            drafted = torch.where(live, drafted, -1)
            run = self.run.gather(1, at.clamp(max=tokens).long()[:, None])[:, 0]
            accepted = torch.minimum(run, drafted.clamp(min=0))
            # looked-at tokens that were not drafted cost their exit step alone
            extra = (looks - drafted).clamp(min=0) * self.ratio / 2
            time += torch.where(live, 1.0 + drafted * self.ratio + extra, 0.0)
            at = torch.where(live, at + accepted + 1, at)
            thompson_update(
                *state, drafted.to(torch.int32), accepted.to(torch.int32),
                discount=self.discount, bucket=bucket,
            )  # fmt: skip
            self.history.append((float(state[0].sum(-1).mean()), float(state[1].sum(-1).mean())))
        return time, state

    def _plan(self, rule, state, cap, seeds, at, part):
        return thompson_draft_length(
            state[0][part], state[1][part], cap[part], rule, self.costs, seeds[part], at[part]
        )

    def _look(self, state, cap, seeds, at):
        rows, tokens = self.rank.shape
        length = torch.zeros(rows, dtype=torch.int32)
        looking, looks = torch.zeros_like(length), torch.zeros_like(length)
        bucket = torch.zeros(rows, MAX_DRAFT, dtype=torch.int32)
        run = torch.zeros(rows, 3)
        for step in range(MAX_DRAFT + 1):
            where = (at + max(step - 1, 0)).clamp(max=tokens - 1).long()
            top = self.top1.gather(1, where[:, None])[:, 0]
            thompson_look(
                state[0], state[1], cap, self.costs, self.ratio / 2, seeds, at, step, top,
                length, bucket, run, looking,
            )  # fmt: skip
            looks += looking * (cap >= 0)
            if not bool(looking.any()):
                break
        return length, bucket, looks


def load_sets(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """rank and top1 by set; and a set whose drafts are never accepted."""
    with np.load(path) as traces:
        names = sorted({key.rpartition("|")[0] for key in traces})
        sets = {
            name: (
                torch.from_numpy(traces[f"{name}|rank"].astype(np.int32)),
                torch.from_numpy(traces[f"{name}|top1"].astype(np.float32)),
            )
            for name in names
        }
    rank, top1 = next(iter(sets.values()))
    sets["hopeless"] = (torch.ones_like(rank), top1)
    return sets


def replay_set(rank, top1, ratio, prior, discount, rules: dict[str, tuple[Rule, int]]):
    """By rule: x_hindsight, x_plain, its worst carried over and fresh, its mean carried over."""
    tokens = rank.numel()
    replay = Replay(rank, top1, ratio, prior, discount)
    constant = {
        n: float(replay.replay(Rule.CONSTANT, n, 0, None)[0].sum()) / tokens for n in CONSTANTS
    }
    best = min(constant.values())
    out = {}
    for name, (rule, length) in rules.items():
        fresh, _ = replay.replay(rule, length, 1, None)
        # Carried over: the sequences of a set one after the other, in so many lanes.
        lanes, carried, state = 8, [], None
        for first in range(0, len(rank) // lanes * lanes, lanes):
            part = slice(first, first + lanes)
            lane = Replay(rank[part], top1[part], ratio, prior, discount)
            time, state = lane.replay(rule, length, 2 + first, state)
            carried.append(time)
        steady = torch.cat(carried[1:]) / rank.shape[1]
        fresh = fresh / rank.shape[1]
        out[name] = (
            float(fresh.mean()) / best,
            float(fresh.mean()),
            float(steady.max()),
            float(fresh.max()),
            float(steady.mean()),
        )
    return out


def main() -> None:
    """Replay, print a table, write `controller_replay.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.25])
    parser.add_argument("--prior", type=float, nargs=2, help="alpha, beta (the demo head's)")
    parser.add_argument("--discount", type=float, default=DEFAULT_DISCOUNT)
    parser.add_argument("--rules", nargs="+", default=["cost", "calibrated", "bernoulli"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    if args.prior is None:
        head = eesd.load("demo", device="cpu").exit_head
        assert head is not None
        prior = head.config.prior_alpha, head.config.prior_beta
        args.prior = [PRIOR_WEIGHT * value for value in prior]
    rules = {name: (Rule[name.upper()], MAX_DRAFT) for name in args.rules}
    rows = []
    for ratio in args.ratios:
        means = defaultdict(list)
        for name, (rank, top1) in load_sets(args.traces).items():
            found = replay_set(rank, top1, ratio, tuple(args.prior), args.discount, rules)
            for rule, figures in found.items():
                rows.append(row(rule, name, ratio, *figures))
                if name != "hopeless":
                    means[rule].append(figures)
        for rule, figures in means.items():
            mean = np.asarray(figures)
            worst = mean[:, 2].max(), mean[:, 3].max()
            rows.append(row(rule, "mean", ratio, *mean[:, :2].mean(0), *worst, mean[:, 4].mean()))
        for entry in rows:
            if entry["cost_ratio"] == ratio and entry["set"] in ("mean", "hopeless"):
                print(entry, flush=True)
    rows += [{**entry, "rule": "default"} for entry in rows if entry["rule"] == DEFAULT]
    print(write_results("controller_replay", rows, out=args.out, on="cpu"))


def row(rule, name, ratio, x_hindsight, x_plain, worst_carried, worst_fresh, carried):
    """A result row."""
    return {
        "rule": rule,
        "set": name,
        "cost_ratio": ratio,
        "x_hindsight": round(float(x_hindsight), 4),
        "x_plain": round(float(x_plain), 4),
        "x_plain_carried": round(float(carried), 4),
        "x_plain_worst_carried": round(float(worst_carried), 4),
        "x_plain_worst_fresh": round(float(worst_fresh), 4),
    }


if __name__ == "__main__":
    main()
