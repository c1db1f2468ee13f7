"""Proof of the coupled law: drafts and target race with one noise, exactly as it is shared."""

from fractions import Fraction

import pytest
from enumeration import Context, Dice, Key, Round, World, outcomes, plain, speculative, worst_bias
from rounds import Counters, Offered, at_most, draw, linear_rounds, tree_rounds

from eesd_kernels import Law

COUPLED = (Law.COUPLED, Law.COUPLED)
ROUNDS = {
    "linear 1": linear_rounds(at_most(1), *COUPLED),
    "linear 2": linear_rounds(at_most(2), *COUPLED),
    "tree 2, 2": tree_rounds((2, 2), *COUPLED),
    "tree 3": tree_rounds((3,), *COUPLED),
    "pruned": tree_rounds((3, 1), *COUPLED, offered=lambda c, q: sorted(c)[1:]),
}


def text(dice: Dice, one_round: Round, tokens: int) -> Context:
    run: Context = ()
    while len(run) < tokens:
        run += one_round(dice, run)
    return run[:tokens]


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
def test_joint_law_is_the_targets(rounds):
    for seed in range(4):
        world = World(seed, 3)
        assert speculative(3, rounds(world)) == plain(world, 3)


@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
def test_text_is_plain_samplings_for_every_noise(rounds):
    """Not the law alone: with the same noise, the same tokens, whatever was drafted."""
    for seed in range(3):
        world = World(seed, 3)

        def both(dice: Dice, world: World = world) -> bool:
            mine = text(dice, rounds(world), 3)
            plainly = text(
                dice, lambda d, run: (d.race(Key("target", len(run), 0), world.law("p", run)),), 3
            )
            return mine == plainly

        assert all(equal for equal, _, _ in outcomes(both))


def test_with_a_round_base_text_would_depend_on_the_rounds():
    """The twin: the law stays, the equality goes. (The base is that of the sampled law.)"""
    world, counters = World(1, 3), Counters()
    base = [counters.base((0,) * n, Law.SAMPLED) for n in range(3)]

    def both(dice: Dice) -> bool:
        def one_round(dice: Dice, run: Context, drafts: int) -> Context:
            start = len(run)
            while True:
                key = Key("target", len(run), base[start])
                child = draw(dice, key, world.law("q", run), 1, Law.COUPLED)
                token = dice.race(key, world.law("p", run))
                run = (*run, token)
                if len(run) - start > drafts or token not in child:
                    return run[start:]

        short, long = (text(dice, lambda d, r, n=n: one_round(d, r, n), 2) for n in (0, 1))
        return short == long

    assert not all(equal for equal, _, _ in outcomes(both))


@pytest.mark.parametrize("rule", [Law.SAMPLED, Law.DETERMINISTIC], ids=lambda rule: rule.name)
def test_coupled_drafts_under_another_rule_are_biased(rule: Law):
    """Where the residual races with the noise that drew the children."""
    rounds = linear_rounds(at_most(1), Law.COUPLED, rule)
    assert worst_bias(rounds, 1, range(12), 3) > Fraction(1, 100)


def mean_run(rounds, seeds: range) -> Fraction:
    total = Fraction(0)
    for seed in seeds:
        one_round = rounds(World(seed, 3))
        runs = outcomes(lambda dice, one_round=one_round: one_round(dice, ()))
        total += sum((len(run) * chance for run, chance, _ in runs), Fraction(0))
    return total


def test_the_shared_noise_is_what_makes_drafts_agree():
    shared = mean_run(linear_rounds(at_most(1), *COUPLED), range(12))
    apart = mean_run(linear_rounds(at_most(1), Law.SAMPLED, Law.COUPLED), range(12))
    assert shared > apart


def test_any_order_and_any_pruning_is_free():
    edits: list[Offered] = [lambda c, q: sorted(c), lambda c, q: c[1:], lambda c, q: [*c, *c]]
    for offered in edits:
        rounds = tree_rounds((2, 2), *COUPLED, offered=offered)
        for seed in range(3):
            world = World(seed, 3)
            assert speculative(2, rounds(world)) == plain(world, 2)
