"""Proof of block verification by exact enumeration, with the noise that its rounds share."""

from fractions import Fraction

import pytest
from enumeration import Round, World, outcomes, plain, speculative, worst_bias
from rounds import LENGTHS, Counters, Lengths, at_most, block_rounds, linear_rounds

from eesd_kernels import Law


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_joint_law_is_the_targets(lengths: Lengths):
    for seed in range(4):
        world = World(seed)
        assert speculative(3, block_rounds(lengths)(world)) == plain(world, 3)


@pytest.mark.parametrize(("drafts", "tokens"), [(2, 3), (3, 3)])
def test_without_the_round_base_it_is_biased(drafts: int, tokens: int):
    """A round tests tokens beyond its run, and their uniforms would come again in the next."""
    apart, shared = (
        worst_bias(block_rounds(at_most(drafts), counters=counters), tokens, range(6), 3)
        for counters in (Counters(), Counters(round_base=False))
    )
    assert apart == 0
    assert Fraction(2, 100) < shared < Fraction(1, 10)


def test_a_fixed_choice_is_biased():
    rounds = block_rounds(at_most(2), drawn=Law.DETERMINISTIC)
    assert worst_bias(rounds, 2, range(8)) > Fraction(1, 20)


def test_dropping_a_drawn_token_is_biased():
    rounds = block_rounds(at_most(2), kept=lambda token, q: q[token] >= Fraction(1, 3))
    assert worst_bias(rounds, 2, range(8)) > Fraction(1, 20)


def test_drafts_that_race_with_the_residuals_noise_are_biased():
    rounds = block_rounds(at_most(2), counters=Counters(draft_apart=False))
    assert worst_bias(rounds, 2, range(6), 3) > Fraction(1, 100)


def mean_run(one_round: Round) -> Fraction:
    runs = outcomes(lambda dice: one_round(dice, ()))
    return sum((len(run) * chance for run, chance, _ in runs), Fraction(0))


def test_it_accepts_at_least_as_many_tokens_and_sometimes_more():
    """And one token is one rule: with a draft of one the two agree."""
    gains = []
    for seed in range(16):
        world = World(seed)
        for length in (1, 2, 3):
            block = mean_run(block_rounds(at_most(length))(world))
            gain = block - mean_run(linear_rounds(at_most(length), *[Law.SAMPLED] * 2)(world))
            assert gain == 0 if length == 1 else gain >= 0
            gains.append(gain)
    assert max(gains) > Fraction(1, 20)
