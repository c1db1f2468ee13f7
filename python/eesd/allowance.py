"""How much slower than plain decoding drafts may make a sequence, whatever becomes of them."""

from typing import NamedTuple

DEFAULT_MAX_SLOWDOWN = 0.02
"""A sequence of `SETTLED` tokens or more takes at most 1.02 of plain decoding's time by the cost
table: a posterior carried into a text where little is accepted cost one up to 1.15 without a bound
(`bench.controller_replay`, `cost_unbound`). A batch keeps it together, for it shares its rounds."""

SETTLED = 256


class Allowance(NamedTuple):
    """What drafts may lose, in plain steps: the credit of `thompson_draft_length` and its fellows.

    start: at the start of a sequence. token: what each token brings, its own step included.
    limit: what may be saved up, and so be lost from any moment on.
    """

    start: float
    token: float
    limit: float

    @classmethod
    def of(cls, max_slowdown: float, longest: float) -> "Allowance":
        """Half of the slowdown is there at once, half comes with the tokens.

        `start + token n <= (1 + max_slowdown) n` then holds from `SETTLED` tokens on, and a long
        sequence can always try again. longest: what a round with the longest draft costs.
        """
        start = max_slowdown / 2 * SETTLED
        return cls(start, 1 + max_slowdown / 2, 4 * start + longest)
