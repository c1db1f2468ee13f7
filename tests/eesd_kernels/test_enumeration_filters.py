"""top-k, top-p and min-p: the documented thresholds on rationals, and verification under them."""

import math
import random
from fractions import Fraction

import pytest
import torch
from enumeration import (
    Context,
    Dice,
    Key,
    Round,
    Weights,
    World,
    plain,
    speculative,
    total_variation,
)
from rounds import at_most, block_rounds, draw, linear_rounds, tree_rounds

from eesd_kernels import Law
from eesd_kernels.reference import target_law


def top_k(p: Weights, k: int) -> Weights:
    least = sorted(p, reverse=True)[min(k, len(p)) - 1] if k else Fraction(0)
    return normal([x if x >= least else Fraction(0) for x in p])


def top_p(p: Weights, share: Fraction) -> Weights:
    if share >= 1:
        return p
    likelier = [sum((y for y in p if y > x), Fraction(0)) for x in p]
    kept = [
        x if mass < share or mass == 0 else Fraction(0) for x, mass in zip(p, likelier, strict=True)
    ]
    return normal(kept)


def min_p(p: Weights, share: Fraction) -> Weights:
    return normal([x if x >= share * max(p) else Fraction(0) for x in p])


def normal(weights: list[Fraction]) -> Weights:
    return tuple(w / sum(weights) for w in weights)


def filtered(p: Weights, k: int, share: Fraction, least: Fraction) -> Weights:
    """In the documented order; ties at a threshold are kept."""
    return min_p(top_p(top_k(p, k), share), least)


def logits_of(p: Weights) -> torch.Tensor:
    logs = [math.log(x) if x else -math.inf for x in p]
    return torch.tensor(logs, dtype=torch.float64)


def test_the_reference_keeps_what_the_definition_keeps():
    """Thresholds lie between the possible sums (multiples of 1/n), so rounding decides nothing."""
    choice = random.Random(1)
    for _ in range(300):
        p = normal(
            [Fraction(choice.choice((0, 1, 1, 2, 2, 3, 7))) for _ in range(8)] + [Fraction(1)]
        )
        k = choice.randrange(0, 11)
        share = Fraction(choice.randrange(1, 40), 41) + Fraction(1, 10**6)
        least = Fraction(choice.choice((0, 0, 1, 3, 5, 9)), 11)
        got = target_law(logits_of(p), 1.0, k, float(share), float(least))
        assert got is not None
        want = torch.tensor([float(x) for x in filtered(p, k, share, least)], dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 0.1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_equals_stand_together(changes: dict[str, float]):
    p = target_law(torch.tensor([1.0, 3.0, 0.0, 3.0, 3.0]), 0.7, **changes)
    assert p is not None
    assert torch.equal(p, torch.tensor([0, 1, 0, 1, 1], dtype=torch.float64) / 3)


def test_the_order_is_temperature_then_top_k_then_top_p_then_min_p():
    p = normal([Fraction(x) for x in (5, 3, 2, 2)])
    # Of 5/8 and 3/8, what top-k leaves, 0.6 needs the first; of 5/12, 3/12, .. it needs two.
    assert filtered(p, 2, Fraction(6, 10), Fraction(0)) == (1, 0, 0, 0)
    assert top_k(top_p(p, Fraction(6, 10)), 2) == (Fraction(5, 8), Fraction(3, 8), 0, 0)
    got = target_law(logits_of(p), 1.0, 2, 0.6)
    assert got is not None
    assert got.tolist() == [1.0, 0.0, 0.0, 0.0]
    warm = target_law(logits_of(p), 4.0, 2, 0.6)  # a flatter law: now both are needed
    assert warm is not None
    assert int((warm > 0).sum()) == 2


class Filtered(World):
    """A world whose target is filtered; drafts are not, so some are of no target mass."""

    SETTINGS = ((2, Fraction(1), Fraction(0)), (0, Fraction(2, 3), Fraction(0)),
                (0, Fraction(1), Fraction(1, 2)), (3, Fraction(4, 5), Fraction(1, 4)))  # fmt: skip

    def __init__(self, seed: int, vocab: int = 4) -> None:
        super().__init__(seed, vocab)
        self._settings = self.SETTINGS[seed % 4]

    def law(self, which: str, context: Context) -> Weights:
        law = super().law(which, context)
        return filtered(law, *self._settings) if which == "p" else law


RULES = {
    "linear": linear_rounds(at_most(2), Law.SAMPLED, Law.SAMPLED),
    "fixed": linear_rounds(at_most(2), Law.DETERMINISTIC, Law.DETERMINISTIC),
    "tree": tree_rounds((2, 2), Law.SAMPLED, Law.SAMPLED),
    "block": block_rounds(at_most(2)),
}


@pytest.mark.parametrize("rounds", RULES.values(), ids=RULES)
def test_joint_law_is_the_filtered_targets(rounds):
    for seed in range(8):
        world = Filtered(seed)
        assert speculative(2, rounds(world)) == plain(world, 2)


def test_a_filter_on_the_correction_alone_is_biased():
    """The twin: drafts tested against the whole law, the token drawn from the filtered one."""

    def rounds(world: World) -> Round:
        def one_round(dice: Dice, context: Context) -> Context:
            q = world.law("q", context)
            (child,) = draw(dice, Key("draft", 0, 1), q, 1, Law.SAMPLED)
            whole, p = World.law(world, "p", context), world.law("p", context)
            if dice.uniform(Key("accept", 0, 1)) * q[child] < whole[child]:
                return (child,)
            left = [max(x - y, Fraction(0)) for x, y in zip(p, q, strict=True)]
            return (dice.race(Key("target", 0, 1), left if sum(left) else p),)

        return one_round

    worlds = [Filtered(seed) for seed in range(8)]
    far = [total_variation(speculative(1, rounds(w)), plain(w, 1)) for w in worlds]
    assert max(far) > Fraction(1, 20)
