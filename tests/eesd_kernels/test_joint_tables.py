"""Chi-square of the ops' own text on few ids, joint over two and three tokens, and its twins.

The exact laws come from the enumeration: of plain sampling, and of the mistakes.
"""

import pytest
import torch
from enumeration import plain, speculative
from joint import FOUR, THREE, linear_op, pvalue, texts, tree_op
from rounds import Counters, at_most, block_rounds

from eesd_kernels import Law

RULES = [Law.SAMPLED, Law.DETERMINISTIC, Law.COUPLED]


@pytest.mark.parametrize("law", RULES, ids=lambda law: law.name)
@pytest.mark.parametrize("shape", [(2, 2), (3,)], ids=str)
def test_trees(law: Law, shape: tuple[int, ...]):
    text = texts(tree_op(FOUR, shape, law, law), 2, 1500)
    assert pvalue(text, plain(FOUR, 2)) > 1e-3


def test_block():
    text = texts(linear_op(THREE, 2, Law.BLOCK, Law.BLOCK), 3, 1500)
    assert pvalue(text, plain(THREE, 3)) > 1e-3
    text = texts(linear_op(FOUR, 2, Law.BLOCK, Law.BLOCK), 2, 3000)
    assert pvalue(text, plain(FOUR, 2)) > 1e-3


@pytest.mark.parametrize("law", RULES, ids=lambda law: law.name)
def test_linear(law: Law):
    text = texts(linear_op(THREE, 2, law, law), 3, 60_000)
    assert pvalue(text, plain(THREE, 3)) > 1e-3


def test_coupled_text_is_plain_samplings_token_for_token():
    """Whatever was drafted: the ops' text is a function of the seed."""
    plainly = texts(linear_op(FOUR, 0, *[Law.COUPLED] * 2), 4, 1000)
    for one_round in (
        linear_op(FOUR, 1, *[Law.COUPLED] * 2),
        linear_op(FOUR, 3, *[Law.COUPLED] * 2),
        linear_op(FOUR, 2, Law.SAMPLED, Law.COUPLED),
        tree_op(FOUR, (2, 2), *[Law.COUPLED] * 2),
        tree_op(FOUR, (2, 1), *[Law.COUPLED] * 2, resort=True),
    ):
        assert torch.equal(texts(one_round, 4, 1000), plainly)


def test_block_without_the_round_base_has_the_bias_that_was_computed():
    """The op shares its noise exactly as the enumeration says it does."""
    text = texts(linear_op(THREE, 2, Law.BLOCK, Law.BLOCK, round_base=False), 3, 1500)
    shared = block_rounds(at_most(2), counters=Counters(round_base=False))
    assert pvalue(text, plain(THREE, 3)) < 1e-6
    assert pvalue(text, speculative(3, shared(THREE))) > 1e-3


def test_resorted_siblings_would_show():
    text = texts(tree_op(FOUR, (2, 2), Law.SAMPLED, Law.SAMPLED, resort=True), 2, 800)
    assert pvalue(text, plain(FOUR, 2)) < 1e-6


def test_fixed_siblings_under_the_sampled_rule_would_show():
    text = texts(tree_op(FOUR, (2,), Law.DETERMINISTIC, Law.SAMPLED), 2, 800)
    assert pvalue(text, plain(FOUR, 2)) < 1e-6


def test_a_fixed_choice_under_the_block_rule_would_show():
    text = texts(linear_op(THREE, 2, Law.DETERMINISTIC, Law.BLOCK), 2, 800)
    assert pvalue(text, plain(THREE, 2)) < 1e-6
