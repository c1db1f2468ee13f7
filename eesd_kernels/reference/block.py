"""Block verification of a linear draft (Sun et al. 2024), over plain numbers as `acceptance.py`.

For a draft `t_1 .. t_l`, row i with the target's law p of `t_(i+1)` and the law `q = w / W` on k
ids that drew it, `a_0 = 1` and

    a_(i+1) = min(a_i p(t_(i+1)) / q(t_(i+1)), 1)      R_i(x) = max(a_i p(x) - q(x), 0)
    S_i = sum R_i = sum over the k ids + a_i o, with o the mass of p outside them

the number of accepted tokens is the largest m with `u_l < a_l` (m = l) or, below l,
`u_m (S_m + 1 - a_m) < S_m`; else 0. The next token is drawn from `R_m`, at m = l from p.

Why it is exact: the chance that at least i tokens stand, given `t_1 .. t_i`, is `a_i`. At the end
that is the test. Before it, `sum_x q(x) min(a_i p(x) / q(x), 1) = a_i - S_i` is the chance that
more than i stand, and i stand with the chance `(1 - a_i + S_i) S_i / (S_i + 1 - a_i) = S_i`. So
t follows with mass `min(a_i p(t), q(t))` as a draft and `R_i(t)` as a draw: `a_i p(t)` in all.
The length may depend on the tokens drafted so far, since only the last one needs the end's test.

The tests of tokens beyond m are used noise: without the round base in the counters they would
come again in the next round, and its text would be biased.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from eesd_kernels.reference.acceptance import Number


@dataclass
class BlockWalk:
    """The rows of one draft, added in order; `stands[i]` is a_i and `residual[i]` is R_i."""

    stands: list[Number] = field(default_factory=lambda: [1])
    residual: list[list[Number]] = field(default_factory=list)
    mass: list[Number] = field(default_factory=list)

    def add(self, p: list[Number], w: list[Number], outside: Number, child: int) -> None:
        """A row: p and w on its k ids, the mass of p outside them, and the drafted one's index."""
        a, total = self.stands[-1], sum(w)
        rest = [max(a * x - y / total, 0 * x) for x, y in zip(p, w, strict=True)]
        self.residual.append(rest)
        self.mass.append(sum(rest) + a * outside)
        self.stands.append(min(a * p[child] * total / w[child], 1))

    def accepted(self, uniform: Callable[[int], Number]) -> int:
        """m, given the uniform that tests each draft token (1 for the first)."""
        last = len(self.mass)
        for i in range(last, 0, -1):
            if i == last:
                stops = uniform(i) < self.stands[i]
            else:
                stops = uniform(i) * (self.mass[i] + 1 - self.stands[i]) < self.mass[i]
            if stops:
                return i
        return 0
