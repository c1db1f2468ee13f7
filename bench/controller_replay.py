"""Replay the controller's rules on recorded traces: what each would have cost.

A round of draft length l costs `1 + l r` plain steps, r the cost ratio of a draft step (half of it
the layers below N, half the exit); the trace says how many of the l would have been accepted.
`x_hindsight` is a rule's time per token over that of the best constant length, chosen for the set
in hindsight; `x_plain` over plain decoding's, `x_plain_worst_*` that of the slowest single
sequence. The decisions are the package's own ops'.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import eesd
from bench.record_traces import TRACES
from bench.results import write_results
from eesd.allowance import DEFAULT_MAX_SLOWDOWN, Allowance
from eesd.controller import DEFAULT_DISCOUNT, PRIOR_WEIGHT, SCHEDULES
from eesd_kernels import Rule, thompson_draft_length, thompson_look, thompson_update

MAX_DRAFT = 8
BUCKETS = 8
LANES = 8
DEFAULT = SCHEDULES["thompson"].name.lower()
MADE_UP = ("hopeless", "trap", "turn")
UNBOUND = "_unbound"  # a rule without a credit


class Played(NamedTuple):
    """A rule, its longest draft, and whether a credit bounds what it may lose."""

    rule: Rule
    length: int = MAX_DRAFT
    bound: bool = True


class Round(NamedTuple):
    """What stood after a round, each `[sequences]`."""

    alpha: torch.Tensor
    beta: torch.Tensor
    drafted: torch.Tensor  # -1: the sequence had ended
    tokens: torch.Tensor  # emitted so far
    time: torch.Tensor  # used so far, in plain steps
    credit: torch.Tensor  # what drafts may still lose


@dataclass
class Replay:
    """One rule over sequences side by side, each on its own.

    rank, top1: `[sequences, tokens]`. ratio: of a draft step's cost to a plain step's.
    """

    rank: torch.Tensor
    top1: torch.Tensor
    ratio: float
    prior: tuple[float, float]
    discount: float
    max_slowdown: float = DEFAULT_MAX_SLOWDOWN
    history: list[Round] = field(default_factory=list)

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

    def replay(self, played: Played, seed: int, carried: list[torch.Tensor] | None = None):
        """Time per sequence `[sequences]` and the posterior afterwards."""
        rule, length, bound = played
        rows, tokens = self.rank.shape
        calibrated = rule is Rule.CALIBRATED
        state = carried or self.posterior(BUCKETS if calibrated else None)
        allowance = Allowance.of(self.max_slowdown, float(self.costs[-1]))
        credit = torch.full((rows,), allowance.start) if bound else None
        at = torch.zeros(rows, dtype=torch.int32)
        time = torch.zeros(rows, dtype=torch.float64)
        seeds = torch.arange(rows) + 1_000_003 * seed
        while bool((at < tokens).any()):
            cap = torch.where(at < tokens, (tokens - at - 1).clamp(max=length), -1).to(torch.int32)
            live, bucket = cap >= 0, None
            if calibrated:
                drafted, bucket, looks = self._look(state, cap, seeds, at, credit)
            else:
                looks = drafted = self._plan(rule, state, cap, seeds, at, credit)
            drafted = torch.where(live, drafted, -1)
            run = self.run.gather(1, at.clamp(max=tokens).long()[:, None])[:, 0]
            accepted = torch.minimum(run, drafted.clamp(min=0))
            # looked-at tokens that were not drafted cost their exit step alone
            extra = (looks - drafted).clamp(min=0) * self.ratio / 2
            time += torch.where(live, 1.0 + drafted * self.ratio + extra, 0.0)
            at = torch.where(live, at + accepted + 1, at)
            thompson_update(
                *state, drafted, accepted, discount=self.discount, bucket=bucket, credit=credit,
                token_credit=allowance.token, credit_limit=allowance.limit,
            )  # fmt: skip
            alpha, beta = (x.reshape(rows, -1).sum(1) for x in state[:2])
            left = torch.full((rows,), torch.inf) if credit is None else credit.clone()
            self.history.append(Round(alpha, beta, drafted, at, time.clone(), left))
        return time, state

    def _plan(self, rule, state, cap, seeds, at, credit):
        def part(rows):
            paid = None if credit is None else credit[rows]
            return thompson_draft_length(
                state[0][rows], state[1][rows], cap[rows], rule, self.costs, seeds[rows], at[rows],
                paid,
            )  # fmt: skip

        if rule is not Rule.COST:
            return part(slice(None))
        # A batch has one length: each sequence is a batch of its own here.
        length = torch.zeros_like(cap)
        for b in (cap >= 0).nonzero().flatten().tolist():
            length[b] = part(slice(b, b + 1))
        return length

    def _look(self, state, cap, seeds, at, credit):
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
                length, bucket, run, looking, credit,
            )  # fmt: skip
            looks += looking * (cap >= 0)
            if not bool(looking.any()):
                break
        return length, bucket, looks


def load_sets(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """rank and top1 by set, and three made-up sets of the hardest kind.

    `hopeless`: no draft is accepted. `trap`: of a lane's sequences every other has all its drafts
    accepted, the rest none. `turn`: all are, in the first half of each sequence; then none.
    """
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
    odd, late = (
        torch.arange(len(rank)) // LANES % 2,
        torch.arange(rank.shape[1]) * 2 >= rank.shape[1],
    )
    for name, hard in zip(MADE_UP, (torch.ones(1), odd[:, None], late), strict=True):
        sets[name] = (hard.expand_as(rank).to(torch.int32), top1)
    return sets


def best_constant(rank, top1, ratio) -> float:
    """Plain steps a token of the best constant length, chosen in hindsight."""
    replay = Replay(rank, top1, ratio, (1.0, 1.0), 1.0)
    times = [
        replay.replay(Played(Rule.CONSTANT, n, bound=False), 0)[0].sum()
        for n in range(MAX_DRAFT + 1)
    ]
    return float(min(times)) / rank.numel()


def carry_over(rank, top1, ratio, prior, discount, played: Played) -> list[Replay]:
    """A set's sequences one after the other in so many lanes; a replay for each turn."""
    turns, state = [], None
    for first in range(0, len(rank) // LANES * LANES, LANES):
        part = slice(first, first + LANES)
        turns.append(Replay(rank[part], top1[part], ratio, prior, discount))
        _, state = turns[-1].replay(played, 2 + first, state)
    return turns


def replay_set(rank, top1, ratio, prior, discount, rules: dict[str, Played]):
    """The figures of a row by rule."""
    best, tokens, out = best_constant(rank, top1, ratio), rank.shape[1], {}
    for name, played in rules.items():
        fresh = Replay(rank, top1, ratio, prior, discount).replay(played, 1)[0] / tokens
        turns = carry_over(rank, top1, ratio, prior, discount, played)
        carried = torch.cat([turn.history[-1].time for turn in turns[1:]]) / tokens
        out[name] = {
            "x_hindsight": float(fresh.mean()) / best,
            "x_plain": float(fresh.mean()),
            "x_plain_carried": float(carried.mean()),
            "x_plain_worst_carried": float(carried.max()),
            "x_plain_worst_fresh": float(fresh.max()),
        }
    return out


def main() -> None:
    """Replay, print a table, write `controller_replay.json`; or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.25])
    parser.add_argument("--prior", type=float, nargs=2, help="alpha, beta (the demo head's)")
    parser.add_argument("--discount", type=float, default=DEFAULT_DISCOUNT)
    parser.add_argument(
        "--rules", nargs="+", default=["cost", "calibrated", "bernoulli", "cost" + UNBOUND]
    )
    parser.add_argument("--plot", type=Path, help="draw regret and posterior there, and end")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    if args.prior is None:
        head = eesd.load("demo", device="cpu").exit_head
        assert head is not None
        prior = head.config.prior_alpha, head.config.prior_beta
        args.prior = [PRIOR_WEIGHT * value for value in prior]
    rules = {
        name: Played(Rule[name.removesuffix(UNBOUND).upper()], bound=not name.endswith(UNBOUND))
        for name in args.rules
    }
    sets = load_sets(args.traces)
    if args.plot is not None:
        from bench.controller_plot import draw

        draw(args.plot, sets, tuple(args.prior), args.discount)
        return
    rows = []
    for ratio in args.ratios:
        means = defaultdict(list)
        for name, (rank, top1) in sets.items():
            found = replay_set(rank, top1, ratio, tuple(args.prior), args.discount, rules)
            for rule, figures in found.items():
                rows.append(row(rule, name, ratio, figures))
                if name in MADE_UP:
                    print(rows[-1], flush=True)
                else:
                    means[rule].append(figures)
        for rule, of_sets in means.items():
            figures = {
                key: (max if "worst" in key else np.mean)([f[key] for f in of_sets])
                for key in of_sets[0]
            }
            rows.append(row(rule, "mean", ratio, figures))
            print(rows[-1], flush=True)
    rows += [{**entry, "rule": "default"} for entry in rows if entry["rule"] == DEFAULT]
    print(write_results("controller_replay", rows, out=args.out, on="cpu"))


def row(rule, name, ratio, figures):
    """A result row."""
    rounded = {key: round(float(value), 4) for key, value in figures.items()}
    return {"rule": rule, "set": name, "cost_ratio": ratio, **rounded}


if __name__ == "__main__":
    main()
