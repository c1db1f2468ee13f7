"""Exact enumeration on rationals: worlds, noise that is shared where its counters are, rounds.

Every random word has a key, the counters that DESIGN gives it, and a region of values that it may
still have. A question to it (is u below t, who wins the race under these weights) splits the
region; asking the same key again, in whatever round, meets what is left of it. So noise that comes
again shows, and noise that is keyed apart is independent.

The exponentials of a race, over their sum, are uniform on a simplex, and a winner's cell is a
convex polytope: for three ids a polygon with rational corners, cut exactly.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

Context = tuple[int, ...]
Joint = dict[Context, Fraction]
Weights = tuple[Fraction, ...]
Point = tuple[Fraction, ...]
Answers = tuple[tuple[Weights, int], ...]  # of a race: who won under which weights


class World:
    """Laws by context, made on demand and kept: random rationals with zeros."""

    def __init__(self, seed: int, vocab: int = 4) -> None:
        self.vocab = vocab
        self._random = random.Random(seed)
        self._laws: dict[tuple[str, Context], Weights] = {}

    def law(self, which: str, context: Context) -> Weights:
        key = which, context
        if key not in self._laws:
            weights = [self._random.choice((0, 0, 1, 2, 3, 7)) for _ in range(self.vocab)]
            weights[self._random.randrange(self.vocab)] += 1
            self._laws[key] = tuple(Fraction(w, sum(weights)) for w in weights)
        return self._laws[key]


class Key(NamedTuple):
    """The counters of a random word; `extra` is the parent node or the sibling."""

    purpose: str
    position: int
    base: int
    extra: int = 0


def _clip(polygon: list[Point], a: int, b: int, weights: Weights) -> list[Point]:
    """The part where a finishes before b: `E_a w_b <= E_b w_a`."""

    def side(x: Point) -> Fraction:
        return x[a] * weights[b] - x[b] * weights[a]

    out: list[Point] = []
    for start, end in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        f, g = side(start), side(end)
        if f <= 0:
            out.append(start)
        if f * g < 0:
            out.append(tuple((g * x - f * y) / (g - f) for x, y in zip(start, end, strict=True)))
    return out


@lru_cache(maxsize=200_000)
def area(answers: Answers) -> Fraction:
    """The chance of all these answers from one race of three."""
    one, zero = Fraction(1), Fraction(0)
    polygon: list[Point] = [(one, zero, zero), (zero, one, zero), (zero, zero, one)]
    for weights, winner in answers:
        for other in range(3):
            if other != winner:
                polygon = _clip(polygon, winner, other, weights)
    ring = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum((x[0] * y[1] - y[0] * x[1] for x, y in ring), zero))


def _without_winners(answers: Answers) -> Weights | None:
    """The first weights less the winners, where all answers are one order of finishing."""
    left = list(answers[0][0])
    for weights, winner in answers:
        if weights != tuple(left):
            return None
        left[winner] = Fraction(0)
    return tuple(left)


def race_shares(answers: Answers, weights: Weights) -> list[Fraction]:
    """The chance of each winner under `weights`, given earlier answers of the same race."""
    if not answers or weights == _without_winners(answers):  # exponentials forget
        return [w / sum(weights) for w in weights]
    assert len(weights) == 3, "shared races are cut on three ids"
    parts = [area((*answers, (weights, x))) for x in range(3)]
    return [part / sum(parts) for part in parts]


class Uniform:
    """A number in [0, 1) of which only comparisons are ever known."""

    def __init__(self, dice: "Dice", key: Key, scale: Fraction = Fraction(1)) -> None:
        self._dice, self._key, self._scale = dice, key, scale

    def __mul__(self, factor: Fraction) -> "Uniform":
        return Uniform(self._dice, self._key, self._scale * factor)

    def __lt__(self, bound: Fraction) -> bool:
        if self._scale == 0:
            return bound > 0
        return self._dice.below(self._key, bound / self._scale)


class Dice:
    """Answers one run's questions by a script of choices, and notes the choices not taken."""

    def __init__(self, script: Sequence[int], held: dict[Key, Any]) -> None:
        self.chance, self.held = Fraction(1), dict(held)
        self.untried: list[list[int]] = []
        self._script, self._at = list(script), 0

    def _choose(self, shares: Sequence[Fraction]) -> int:
        possible = [i for i, share in enumerate(shares) if share]
        if len(possible) == 1:
            return possible[0]
        if self._at == len(self._script):
            self.untried += [[*self._script, i] for i in possible[1:]]
            self._script.append(possible[0])
        self._at += 1
        chosen = self._script[self._at - 1]
        self.chance *= shares[chosen]
        return chosen

    def uniform(self, key: Key) -> Uniform:
        return Uniform(self, key)

    def below(self, key: Key, bound: Fraction) -> bool:
        low, high = self.held.get(key, (Fraction(0), Fraction(1)))
        bound = min(max(bound, low), high)
        yes = (bound - low) / (high - low)
        answer = self._choose((1 - yes, yes)) == 1
        self.held[key] = (low, bound) if answer else (bound, high)
        return answer

    def race(self, key: Key, weights: Sequence[Fraction]) -> int:
        """`argmin E_x / w(x)` of the race with that key."""
        answers, asked = self.held.get(key, ()), tuple(weights)
        winner = self._choose(race_shares(answers, asked))
        if (asked, winner) not in answers:
            self.held[key] = (*answers, (asked, winner))
        return winner


def outcomes(
    run: Callable[[Dice], Hashable], held: dict[Key, Any] | None = None
) -> Iterator[tuple[Any, Fraction, dict[Key, Any]]]:
    """Every way the run can go: its result, the chance of it, and the noise as then known."""
    scripts: list[list[int]] = [[]]
    while scripts:
        dice = Dice(scripts.pop(), held or {})
        result = run(dice)
        scripts += dice.untried
        yield result, dice.chance, dice.held


Round = Callable[[Dice, Context], Context]
"""One round after a context: the run of tokens that it emits."""


def speculative(tokens: int, one_round: Round) -> Joint:
    """Joint law of the first tokens over as many rounds as they take.

    Between rounds only noise that can be asked for again is kept: without a round base, and at
    positions not yet emitted.
    """
    done: Joint = defaultdict(Fraction)
    states: dict[tuple[Context, frozenset[tuple[Key, Any]]], Fraction] = {
        ((), frozenset()): Fraction(1)
    }
    while states:
        following: dict[Any, Fraction] = defaultdict(Fraction)
        for (context, known), chance in states.items():
            run_on = lambda dice, context=context: one_round(dice, context)  # noqa: E731
            for run, share, held in outcomes(run_on, dict(known)):
                text = context + run
                if len(text) >= tokens:
                    done[text[:tokens]] += chance * share
                    continue
                again = ((k, v) for k, v in held.items() if not k.base and k.position >= len(text))
                following[text, frozenset(again)] += chance * share
        states = following
    return dict(done)


def plain(world: World, tokens: int) -> Joint:
    law: Joint = {}
    for text in itertools.product(range(world.vocab), repeat=tokens):
        chance = Fraction(1)
        for i, x in enumerate(text):
            chance *= world.law("p", text[:i])[x]
        if chance:
            law[text] = chance
    return law


def total_variation(a: Joint, b: Joint) -> Fraction:
    return sum((abs(a.get(x, 0) - b.get(x, 0)) for x in {*a, *b}), Fraction(0)) / 2


def worst_bias(
    rounds: Callable[[World], Round], tokens: int, seeds: Sequence[int], vocab: int = 4
) -> Fraction:
    """The largest distance from plain sampling over some worlds."""
    worlds = [World(seed, vocab) for seed in seeds]
    return max(total_variation(speculative(tokens, rounds(w)), plain(w, tokens)) for w in worlds)
