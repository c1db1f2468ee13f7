"""Draw what `bench.controller_replay` replays: regret over rounds, a posterior along a text."""

from pathlib import Path

import numpy as np
import torch

from bench.controller_replay import MADE_UP, MAX_DRAFT, Played, Replay, best_constant, carry_over
from eesd_kernels import Rule

RATIO = 0.15
RULES = {  # how to play, colour, label raised by
    "plain decoding": (Played(Rule.CONSTANT, 0, bound=False), "0.5", 0),
    "bernoulli": (Played(Rule.BERNOULLI, bound=False), "tab:orange", 0),
    "cost, the default": (Played(Rule.COST), "tab:blue", 2),
    "calibrated": (Played(Rule.CALIBRATED), "tab:green", -2),
}
BEFORE, AFTER = ("mbpp|N1|T0", 0), ("self_instruct_user|N1|T1", 3)  # set, sequence
WINDOW = 32
Sets = dict[str, tuple[torch.Tensor, torch.Tensor]]


def regret(turns: list[Replay], best: float) -> np.ndarray:
    """`[rounds, lanes]`: plain steps lost so far to the best constant length."""
    spent, lanes = np.zeros(len(turns[0].rank)), [[] for _ in turns[0].rank]
    for turn in turns:
        for done in turn.history:
            now = done.time.numpy() - best * done.tokens.numpy()
            for lane in (done.drafted >= 0).nonzero().flatten().tolist():
                lanes[lane].append(spent[lane] + now[lane])
        spent = np.array([lane[-1] for lane in lanes])
    rounds = min(map(len, lanes))
    return np.array([lane[:rounds] for lane in lanes]).T


def draw_regret(axes, sets: Sets, prior, discount) -> None:
    real = {name: s for name, s in sets.items() if name not in MADE_UP}
    best = {name: best_constant(*s, RATIO) for name, s in real.items()}
    curves = {
        name: [
            regret(carry_over(*s, RATIO, prior, discount, played), best[key]).mean(1)
            for key, s in real.items()
        ]
        for name, (played, _, _) in RULES.items()
    }
    rounds = min(len(curve) for of_rule in curves.values() for curve in of_rule)
    for name, (_, colour, raised) in RULES.items():
        curve = np.mean([c[:rounds] for c in curves[name]], axis=0)
        axes.plot(curve, color=colour)
        axes.annotate(
            name, (rounds, curve[-1]), xytext=(4, raised), textcoords="offset points",
            va="center", color=colour, fontsize=9,
        )  # fmt: skip
    axes.axhline(0, color="0.7", linewidth=0.7)
    axes.set_xlim(0, rounds * 1.2)
    axes.set_xlabel("rounds, the sequences of a set one after the other")
    axes.set_ylabel("regret, plain steps")
    axes.set_title(
        f"Regret against the best constant length of each set in hindsight: mean of {len(real)} "
        f"sets,\na draft step costs {RATIO} of a plain step", fontsize=9.5, loc="left",
    )  # fmt: skip


def draw_posterior(axes, lengths, credits, sets: Sets, prior, discount) -> None:
    from scipy.stats import beta

    parts = [(sets[name][0][i], sets[name][1][i]) for name, i in (BEFORE, AFTER)]
    rank, top1 = (torch.cat(x)[None] for x in zip(*parts, strict=True))
    replay = Replay(rank, top1, RATIO, prior, discount)
    replay.replay(Played(Rule.COST), 1)
    values = torch.stack([torch.stack([x.double() for x in r])[:, 0] for r in replay.history])
    alpha, beta_, drafted, tokens, _, credit = values.numpy().T
    hits = (rank[0] == 0).numpy().astype(float)
    share = np.convolve(hits, np.ones(WINDOW) / WINDOW, "valid")
    axes.plot(
        np.arange(len(share)) + WINDOW / 2, share, color="0.6", linewidth=1,
        label=f"share of tokens that the exit has right, {WINDOW} around",
    )  # fmt: skip
    axes.fill_between(
        tokens, *(beta.ppf(q, alpha, beta_) for q in (0.05, 0.95)), color="tab:blue", alpha=0.25,
        linewidth=0, label="posterior, 5% to 95%",
    )  # fmt: skip
    axes.plot(tokens, alpha / (alpha + beta_), color="tab:blue", label="posterior mean")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("chance of acceptance")
    axes.legend(fontsize=8, loc=(0.06, 0.02), frameon=False)
    axes.set_title(
        "The default rule along one text that changes half-way: greedy code (mbpp), then an answer "
        "sampled at\ntemperature 1 (self_instruct). The credit ends what the posterior is slow to "
        "see", fontsize=9.5, loc="left",
    )  # fmt: skip
    start = np.concatenate(([0], tokens[:-1]))
    lengths.bar(start, drafted, width=np.maximum(tokens - start, 1), align="edge", color="tab:blue")
    lengths.set_ylim(0, MAX_DRAFT + 0.5)
    lengths.set_ylabel("draft length")
    credits.plot(tokens, credit, color="tab:red", linewidth=1.2)
    credits.set_ylim(0, 14)
    credits.set_ylabel("credit, steps")
    credits.set_xlabel("new tokens")
    for axis in (axes, lengths, credits):
        axis.axvline(len(parts[0][0]), color="0.3", linewidth=0.8, linestyle=":")
        axis.set_xlim(0, rank.shape[1])


def draw(path: Path, sets: Sets, prior: tuple[float, float], discount: float) -> None:
    """Write the figure, .svg or .png by its name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "eesd", "path.simplify_threshold": 0.5})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        4, figsize=(7.6, 8.2), height_ratios=(3, 2.6, 1, 1), layout="constrained"
    )
    draw_regret(panels[0], sets, prior, discount)
    draw_posterior(*panels[1:], sets, prior, discount)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.yaxis.label.set_size(8.5)
        axes.xaxis.label.set_size(8.5)
    for axes in panels[1:3]:
        axes.tick_params(labelbottom=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(path)
