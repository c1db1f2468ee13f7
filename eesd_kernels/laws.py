"""Enumerations: how a draft was made, what a random word is for, how a length is chosen."""

from enum import IntEnum


class Law(IntEnum):
    """How a row's draft tokens were chosen, and so which rule may verify them.

    Pairing tokens drawn by one law with another law's rule is biased; the law is therefore an
    argument of drafting and of verification, one a row.
    """

    SAMPLED = 0
    """Drawn from the sparse law q; several children without replacement (Gumbel top-n)."""
    DETERMINISTIC = 1
    """Any fixed choice that looked at no random word of its own: the argmax, the n best."""
    COUPLED = 2
    """Drawn with the target's own race noise: text is a function of the seed alone."""
    BLOCK = 3
    """Drawn like SAMPLED, verified as a block (Sun et al. 2024)."""


class Purpose(IntEnum):
    """The fourth Philox counter word, plus 256 for each attempt of a rejection loop."""

    DRAFT = 1
    TARGET = 2
    ACCEPT = 3
    BETA = 4
    BETA_BOOST = 5
    PLAN = 6


class Rule(IntEnum):
    """How `thompson_draft_length` turns a posterior into a draft length."""

    BERNOULLI = 0
    COST = 1
    CONSTANT = 2
    CALIBRATED = 3
    """A posterior a bucket of the exit's top probability: planned here, decided by `thompson_look`
    step by step."""
