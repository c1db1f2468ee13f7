"""Proof of the acceptance rule by exact enumeration on rationals.

A world is a target law p and a sparse draft law q for every context, random rationals with zeros.
Every outcome of drafting and of `NodeWalk` (the lines that the reference runs in float64) is
followed with its exact probability, across rounds, until enough tokens stand; the joint law of
those tokens must equal the target's, as fractions, without any tolerance.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction

import pytest

from eesd_kernels import Law
from eesd_kernels.reference.acceptance import NodeWalk

VOCAB = 4
Context = tuple[int, ...]
Joint = dict[Context, Fraction]


class World:
    """Laws by context, made on demand and kept."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._laws: dict[tuple[str, Context], list[Fraction]] = {}

    def law(self, which: str, context: Context) -> list[Fraction]:
        key = which, context
        if key not in self._laws:
            weights = [self._random.choice((0, 0, 1, 2, 3, 7)) for _ in range(VOCAB)]
            weights[self._random.randrange(VOCAB)] += 1
            self._laws[key] = [Fraction(w, sum(weights)) for w in weights]
        return self._laws[key]

    def draft(self, context: Context, law: Law) -> list[tuple[int, Fraction]]:
        """Possible draft tokens with the chance of each."""
        q = self.law("q", context)
        if law == Law.DETERMINISTIC:
            return [(max(range(VOCAB), key=lambda x: q[x]), Fraction(1))]
        return [(x, q[x]) for x in range(VOCAB) if q[x]]


def threshold(walk: NodeWalk, child: int) -> Fraction:
    """The chance that `accepts` says yes, found from its answers alone."""
    s = sum(walk.r) + walk.outside
    denominator = walk.w[child] * s if walk.law != Law.DETERMINISTIC else s
    numerator = walk.r[child] * (sum(walk.w) if walk.law != Law.DETERMINISTIC else 1)
    chance = min(Fraction(1), numerator / denominator)
    tiny = Fraction(1, 10**12)
    if chance:
        assert walk.accepts(child, chance - tiny)
    if chance < 1:
        assert not walk.accepts(child, chance)
    return chance


def one_round(
    world: World, context: Context, lengths: Callable[[Context], int], drawn: Law, rule: Law
) -> Joint:
    """Law of the run that a round emits; drafted by law `drawn`, verified by `rule`."""
    out: Joint = defaultdict(Fraction)

    def step(run: Context, left: int, chance: Fraction) -> None:
        p = world.law("p", context + run)
        if left == 0:
            for x in range(VOCAB):
                out[(*run, x)] += chance * p[x]
            return
        for token, drafted in world.draft(context + run, drawn):
            q = world.law("q", context + run)
            ids = [token] if rule == Law.DETERMINISTIC else [x for x in range(VOCAB) if q[x]]
            outside = sum((p[x] for x in range(VOCAB) if x not in ids), Fraction(0))
            weights = [Fraction(1) if rule == Law.DETERMINISTIC else q[x] for x in ids]
            walk = NodeWalk([p[x] for x in ids], weights, outside, rule)
            child = ids.index(token)
            accepted = threshold(walk, child)
            if accepted:
                step((*run, token), left - 1, chance * drafted * accepted)
            if accepted == 1:
                continue
            walk.reject(child)
            residual = list(p)
            for x, mass in zip(ids, walk.r, strict=True):
                residual[x] = mass
            total = sum(residual)
            for x in range(VOCAB):
                out[(*run, x)] += chance * drafted * (1 - accepted) * residual[x] / total

    step((), lengths(context), Fraction(1))
    return out


def speculative(
    world: World, tokens: int, lengths: Callable[[Context], int], drawn: Law, rule: Law
) -> Joint:
    """Joint law of the first tokens over as many rounds as they take."""
    done: Joint = defaultdict(Fraction)
    open_runs: Joint = {(): Fraction(1)}
    while open_runs:
        following: Joint = defaultdict(Fraction)
        for context, chance in open_runs.items():
            for run, share in one_round(world, context, lengths, drawn, rule).items():
                text = context + run
                target = done if len(text) >= tokens else following
                target[text[:tokens]] += chance * share
        open_runs = following
    return done


def plain(world: World, tokens: int) -> Joint:
    law: Joint = {}
    for text in itertools.product(range(VOCAB), repeat=tokens):
        chance = Fraction(1)
        for i, x in enumerate(text):
            chance *= world.law("p", text[:i])[x]
        if chance:
            law[text] = chance
    return law


def total_variation(a: Joint, b: Joint) -> Fraction:
    return sum(abs(a.get(x, 0) - b.get(x, 0)) for x in {*a, *b}) / 2


LENGTHS = {
    "constant-1": lambda context: 1,
    "constant-2": lambda context: 2,
    "constant-3": lambda context: 3,
    "by-context": lambda context: sum(context) % 3,  # may look at what is already emitted
}


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.DETERMINISTIC], ids=lambda law: law.name)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_joint_law_is_the_targets(law: Law, lengths: Callable[[Context], int]):
    for seed in range(8):
        world = World(seed)
        got = {x: c for x, c in speculative(world, 3, lengths, law, law).items() if c}
        assert got == plain(world, 3)


def test_a_fixed_choice_under_the_sampled_rule_is_biased():
    worst = Fraction(0)
    for seed in range(12):
        world = World(seed)
        got = speculative(world, 2, LENGTHS["constant-2"], Law.DETERMINISTIC, Law.SAMPLED)
        worst = max(worst, total_variation(got, plain(world, 2)))
    assert worst > Fraction(1, 20)


def test_the_deterministic_rule_takes_any_draft():
    """It needs no q, so a mixture of fixed choices is as lossless; it accepts less."""
    for seed in range(12):
        world = World(seed)
        got = speculative(world, 2, LENGTHS["constant-2"], Law.SAMPLED, Law.DETERMINISTIC)
        assert {x: c for x, c in got.items() if c} == plain(world, 2)


def test_dropping_a_drawn_token_is_biased():
    """A draft token that is left out for its own low probability takes its mass with it."""

    def lengths_that_look(world: World) -> Joint:
        out: Joint = defaultdict(Fraction)
        q = world.law("q", ())
        for token, drafted in world.draft((), Law.SAMPLED):
            if q[token] < Fraction(1, 3):  # dropped: a plain step instead
                for x, mass in enumerate(world.law("p", ())):
                    out[(x,)] += drafted * mass
                continue
            p = world.law("p", ())
            ids = [x for x in range(VOCAB) if q[x]]
            outside = sum((p[x] for x in range(VOCAB) if x not in ids), Fraction(0))
            walk = NodeWalk([p[x] for x in ids], [q[x] for x in ids], outside, Law.SAMPLED)
            accepted = threshold(walk, ids.index(token))
            out[(token,)] += drafted * accepted
            if accepted < 1:
                walk.reject(ids.index(token))
                residual = list(p)
                for x, mass in zip(ids, walk.r, strict=True):
                    residual[x] = mass
                for x in range(VOCAB):
                    out[(x,)] += drafted * (1 - accepted) * residual[x] / sum(residual)
        return out

    worst = max(
        total_variation(lengths_that_look(world), plain(world, 1))
        for world in map(World, range(12))
    )
    assert worst > Fraction(1, 20)
