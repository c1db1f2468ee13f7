"""Joint tables of what the ops draw on narrow vocabularies, and chi-square against exact laws.

For `bench.joint_laws` and the ops' tests. A draw has a seed of its own. Draft and target laws hang
on the last token alone, so that the exact law of two tokens is `p(x1) p(x2 | x1)`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import eesd_kernels as ek
from eesd_kernels import Law

FIRST, START = 2, 10
"""The token before the two, and its position: no round base is 0 by chance."""
I32 = torch.int32


class Fit(NamedTuple):
    """A chi-square test of counts against a law."""

    p_value: float
    degrees: int


def chi_square(counts: Tensor, law: Tensor) -> Fit:
    """Counts and probabilities of the same cells; rare ones are merged to an expectation of 5.

    Without SciPy, so that it runs where torch does. A cell of no probability is to be empty.
    """
    observed, law = counts.flatten().double().cpu(), law.flatten().double().cpu()
    if bool(observed[law == 0].any()):
        return Fit(0.0, 0)
    observed, law = observed[law > 0], law[law > 0] / law.sum()
    order = law.argsort(stable=True)
    observed, expected = observed[order], law[order] * observed.sum()
    rare = int((expected < 5).sum())
    if rare:
        rare = max(rare, int(torch.searchsorted(expected.cumsum(0), 5.0)) + 1)
        observed, expected = (
            torch.cat((x[:rare].sum()[None], x[rare:])) for x in (observed, expected)
        )
    degrees = len(observed) - 1
    distance = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return Fit(float(torch.special.gammaincc(half, distance / 2)), degrees)


class World:
    """Target logits `[V, V]` by the last token, and the k best of drafts that know them roughly."""

    def __init__(self, vocab: int, k: int, device: str | torch.device = "cpu") -> None:
        g = torch.Generator().manual_seed(5)
        p = torch.randn(vocab, vocab, generator=g) * 1.5
        values, ids = (p + torch.randn(vocab, vocab, generator=g)).topk(k)
        self.vocab, self.device = vocab, device
        self.p, self.values, self.ids = p.to(device), values.to(device), ids.to(device, I32)

    def law(self, temperature: float = 1.0) -> Tensor:
        """Exact probabilities `[V, V]` of the two tokens behind FIRST."""
        p = (self.p.cpu().double() / temperature).softmax(-1)
        return p[FIRST][:, None] * p

    def full(self, n: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=self.device)


Verdict = tuple[Tensor, Tensor, Tensor]  # num_accepted, token ids, status
Round = Callable[[Tensor, int, Sequence[int], Tensor], Verdict]
"""(last token `[n]`, its position, children of each node by depth, seeds)."""


def linear_counts(
    world: World, drawn: Law, rule: Law, draws: int, *, round_base: bool = True
) -> Tensor:
    """Counts `[V, V]` of two tokens by `verify_linear`: drafts of two, drawn by one law."""

    def one_round(previous: Tensor, at: int, shape: Sequence[int], seeds: Tensor) -> Verdict:
        n, token = len(previous), previous
        place = world.full(n, at, I32)
        base = place if round_base else torch.zeros_like(place)
        ids, q_ids, q_probs, logits = [], [], [], [world.p[previous]]
        for depth in range(len(shape)):
            child, q = ek.sample_draft(
                world.values[token], world.ids[token], world.full(n, 1.0),
                world.full(n, drawn, I32), 1, seeds, place + depth + 1, base,
            )  # fmt: skip
            ids.append(child[:, 0])
            q_ids.append(world.ids[token])
            q_probs.append(q)
            token = child[:, 0].long()
            logits.append(world.p[token])
        return ek.verify_linear(
            torch.stack(logits, 1), torch.stack(ids, 1), world.full(n, len(shape), I32),
            torch.stack(q_ids, 1), torch.stack(q_probs, 1), world.full(n, rule, I32),
            world.full(n, 1.0), None, None, None, seeds, place, base,
        )  # fmt: skip

    return _pairs(world, one_round, (1, 1), draws, 0.1)


def tree_counts(world: World, shape: Sequence[int], drawn: Law, rule: Law, draws: int) -> Tensor:
    """The same by `verify_tree`; `shape[d]` children for each node at depth d."""

    def one_round(previous: Tensor, at: int, shape: Sequence[int], seeds: Tensor) -> Verdict:
        n = len(previous)
        place, law = world.full(n, at, I32), world.full(n, drawn, I32)
        ids, parent, level = [previous.to(I32)], [-1], [0]
        for depth, many in enumerate(shape):
            nodes, level = level, []
            for node in nodes:
                token = ids[node].long()
                children, _ = ek.sample_draft(
                    world.values[token], world.ids[token], world.full(n, 1.0), law, many, seeds,
                    place + depth + 1, place, parent=world.full(n, node, I32),
                )  # fmt: skip
                for sibling in range(many):
                    level.append(len(ids))
                    ids.append(children[:, sibling])
                    parent.append(node)
        tokens = torch.stack(ids, 1)
        parents = torch.tensor(parent, dtype=I32, device=world.device)
        accepted, _, token_ids, status = ek.verify_tree(
            world.p[tokens.long()], tokens, parents.expand(n, -1).contiguous(),
            world.full(n, len(ids), I32), world.ids[tokens.long()],
            world.values.softmax(-1)[tokens.long()], world.full(n, rule, I32), world.full(n, 1.0),
            None, None, None, seeds, place, place,
        )  # fmt: skip
        return accepted, token_ids, status

    return _pairs(world, one_round, shape, draws, 0.02)


def _pairs(
    world: World, one_round: Round, shape: Sequence[int], draws: int, least: float
) -> Tensor:
    """Rounds that emit one token are continued by a second at the new base.

    So noise that a round used beyond its accepted part would show here if it came again. At least
    the share `least` is continued.
    """
    seeds = torch.arange(draws, device=world.device)
    first = world.full(draws, FIRST, torch.int64)
    accepted, tokens, status = one_round(first, START, shape, seeds)
    assert not status.any()
    one, two = tokens[:, 0].long(), tokens[:, 1].long()
    short = accepted == 0
    assert least < short.float().mean() < 0.9, "both kinds of rounds are to come"
    two[short] = one_round(one[short], START + 1, shape[:1], seeds[short])[1][:, 0].long()
    cells = (one * world.vocab + two).cpu()
    return torch.bincount(cells, minlength=world.vocab**2).view(world.vocab, world.vocab)


class Candidates:
    """One row of k candidates of an exit, in no order of ids."""

    def __init__(self, k: int, device: str | torch.device = "cpu") -> None:
        g = torch.Generator().manual_seed(k)
        values = torch.randn(k, generator=g).sort(descending=True).values
        self.k, self.device = k, device
        self.values, self.ids = values.to(device), torch.randperm(k, generator=g).to(device, I32)

    def law(self, n: int, temperature: float) -> Tensor:
        """Exact probabilities `[k]` of one child, `[k, k]` of two without replacement."""
        q = (self.values.cpu().double() / temperature).softmax(0)
        if n == 1:
            return q
        return (q[:, None] * q / (1 - q)[:, None]).fill_diagonal_(0)

    def counts(self, n: int, law: Law, temperature: float, draws: int) -> Tensor:
        """How often `sample_draft` drew each child, or each two in their order; a key a draw."""
        draw = torch.arange(draws, device=self.device)
        place = (draw % 1000).to(I32)
        children, q = ek.sample_draft(
            self.values.expand(draws, self.k), self.ids.expand(draws, self.k),
            torch.full((draws,), temperature, device=self.device),
            torch.full_like(place, int(law)), n, draw // 1000 + n * 10_000, place, place // 3,
            parent=place % 5,
        )  # fmt: skip
        assert torch.equal(q, q[:1].expand_as(q))
        torch.testing.assert_close(
            q[0].cpu().double(), self.law(1, temperature), rtol=1e-5, atol=1e-9
        )
        place_of = torch.empty_like(self.ids)
        place_of[self.ids.long()] = torch.arange(self.k, dtype=I32, device=self.device)
        at = place_of[children.long()].long()
        cells = at[:, 0] if n == 1 else at[:, 0] * self.k + at[:, 1]
        return torch.bincount(cells.cpu(), minlength=self.k**n).view((self.k,) * n)
