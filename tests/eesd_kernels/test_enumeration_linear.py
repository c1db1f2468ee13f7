"""Proof of linear verification by exact enumeration: the joint law over rounds, and its twins."""

from fractions import Fraction

import pytest
from enumeration import World, area, outcomes, plain, race_shares, speculative, worst_bias
from rounds import LENGTHS, Counters, Lengths, at_most, linear_rounds, tree_rounds

from eesd_kernels import Law

LAWS = [Law.SAMPLED, Law.DETERMINISTIC]


def test_the_tool_itself():
    """A cell's area is its weight's share; the order of finishing forgets; a region is kept."""
    p = tuple(Fraction(x, 11) for x in (2, 8, 1))
    q = tuple(Fraction(x, 9) for x in (5, 0, 4))
    assert [area(((p, x),)) for x in range(3)] == list(p)
    rest = (p[0], Fraction(0), p[2])
    assert area(((p, 1), (rest, 0))) == p[1] * p[0] / (p[0] + p[2])
    both = [[area(((p, x), (q, y))) for y in range(3)] for x in range(3)]
    assert [sum(row) for row in both] == list(p)
    assert [sum(column) for column in zip(*both, strict=True)] == list(q)
    # Both by hand: E_x >= E_a max(p_x / p_a, q_x / q_a) for all x.
    assert both[0][0] == 1 / sum(max(a / p[0], b / q[0]) for a, b in zip(p, q, strict=True))
    assert race_shares(((p, 1),), p) == [0, 1, 0]
    law = {
        answers: chance
        for answers, chance, _ in outcomes(
            lambda dice: tuple(dice.uniform("u") < Fraction(t, 4) for t in (1, 3, 2))
        )
    }
    assert law == {
        (True, True, True): Fraction(1, 4),
        (False, True, True): Fraction(1, 4),
        (False, True, False): Fraction(1, 4),
        (False, False, False): Fraction(1, 4),
    }


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_joint_law_is_the_targets(law: Law, lengths: Lengths):
    for seed in range(4):
        world = World(seed)
        assert speculative(3, linear_rounds(lengths, law, law)(world)) == plain(world, 3)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_only_noise_that_decided_nothing_comes_again_without_the_round_base(law: Law):
    """Why the base matters to block verification alone: see its own twin."""
    counters = Counters(round_base=False)
    rounds = linear_rounds(at_most(2), law, law, counters)
    for seed in range(4):
        world = World(seed, 3)
        assert speculative(3, rounds(world)) == plain(world, 3)


def test_a_fixed_choice_under_the_sampled_rule_is_biased():
    rounds = linear_rounds(at_most(2), Law.DETERMINISTIC, Law.SAMPLED)
    assert worst_bias(rounds, 2, range(12)) > Fraction(1, 20)


def test_drafts_that_race_with_the_residuals_noise_are_biased():
    """vLLM #47386; also what coupled drafts under the sampled rule are, were the bases equal."""
    rounds = linear_rounds(at_most(1), Law.SAMPLED, Law.SAMPLED, Counters(draft_apart=False))
    assert worst_bias(rounds, 1, range(12), 3) > Fraction(1, 100)


def test_a_draw_under_the_coupled_rule_is_exact_and_accepts_less():
    """The coupled rule looks at p alone, so it takes any draft; only its own are often right."""
    rounds = linear_rounds(at_most(2), Law.SAMPLED, Law.COUPLED)
    for seed in range(6):
        world = World(seed)
        assert speculative(2, rounds(world)) == plain(world, 2)


def test_the_deterministic_rule_takes_any_draft():
    """It needs no q: what the ops do where q is absent."""
    rounds = linear_rounds(at_most(2), Law.SAMPLED, Law.DETERMINISTIC)
    for seed in range(6):
        world = World(seed)
        assert speculative(2, rounds(world)) == plain(world, 2)


def test_dropping_a_drawn_token_is_biased():
    """A draft token that is left out for its own low probability takes its mass with it."""

    def offered(children: list[int], q: tuple[Fraction, ...]) -> list[int]:
        return [t for t in children if q[t] >= Fraction(1, 3)]

    rounds = tree_rounds((1,), Law.SAMPLED, Law.SAMPLED, offered=offered)
    assert worst_bias(rounds, 1, range(12)) > Fraction(1, 20)
    fixed = tree_rounds((1,), Law.DETERMINISTIC, Law.DETERMINISTIC, offered=offered)
    assert worst_bias(fixed, 1, range(12)) == 0
