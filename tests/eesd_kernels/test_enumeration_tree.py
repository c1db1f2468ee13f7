"""Proof of tree verification by exact enumeration: depth 2, several siblings, and its twins."""

from fractions import Fraction

import pytest
from enumeration import World, plain, speculative, worst_bias
from rounds import Counters, Offered, tree_rounds

from eesd_kernels import Law

LAWS = [Law.SAMPLED, Law.DETERMINISTIC]
SHAPES = {"2, 2": (2, 2), "3, 1": (3, 1), "1, 3": (1, 3), "4": (4,)}
FEW = Fraction(1, 20)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_joint_law_is_the_targets(law: Law, shape: tuple[int, ...]):
    for seed in range(2):
        world = World(seed)
        assert speculative(3, tree_rounds(shape, law, law)(world)) == plain(world, 3)


def test_sampled_siblings_under_the_deterministic_rule_are_exact():
    """What the op does where q is absent."""
    rounds = tree_rounds((2, 2), Law.SAMPLED, Law.DETERMINISTIC)
    for seed in range(2):
        world = World(seed)
        assert speculative(2, rounds(world)) == plain(world, 2)


def test_second_copies_of_a_sibling_take_nothing():
    for law in LAWS:
        rounds = tree_rounds((2, 2), law, law, offered=lambda c, q: [c[0], c[0], *c[1:], *c])
        for seed in range(4):
            world = World(seed)
            assert speculative(2, rounds(world)) == plain(world, 2)


def test_noise_that_decided_nothing_may_come_again():
    """A tree walk, too, looks at no noise beyond the place where it stops."""
    rounds = tree_rounds((2, 2), Law.SAMPLED, Law.SAMPLED, Counters(round_base=False))
    for seed in range(4):
        world = World(seed, 3)
        assert speculative(3, rounds(world)) == plain(world, 3)


EDITS: dict[str, Offered] = {
    "sorted by id": lambda c, q: sorted(c),
    "sorted by q": lambda c, q: sorted(c, key=lambda t: -q[t]),
    "pruned by its own q": lambda c, q: [t for t in c if q[t] >= Fraction(1, 3)],
    "its best alone": lambda c, q: [max(c, key=lambda t: q[t])],
}


@pytest.mark.parametrize("offered", EDITS.values(), ids=EDITS)
def test_drawn_siblings_bear_no_second_thoughts(offered: Offered):
    rounds = tree_rounds((3,), Law.SAMPLED, Law.SAMPLED, offered=offered)
    assert worst_bias(rounds, 1, range(12)) > FEW


@pytest.mark.parametrize("offered", EDITS.values(), ids=EDITS)
def test_fixed_siblings_bear_them(offered: Offered):
    rounds = tree_rounds((2, 2), Law.DETERMINISTIC, Law.DETERMINISTIC, offered=offered)
    for seed in range(4):
        world = World(seed)
        assert speculative(2, rounds(world)) == plain(world, 2)


def test_fixed_siblings_under_the_sampled_rule_are_biased():
    rounds = tree_rounds((2,), Law.DETERMINISTIC, Law.SAMPLED)
    assert worst_bias(rounds, 1, range(12)) > FEW


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_one_uniform_for_all_siblings_is_biased(law: Law):
    rounds = tree_rounds((3,), law, law, Counters(siblings_apart=False))
    assert worst_bias(rounds, 1, range(12)) > Fraction(1, 100)
