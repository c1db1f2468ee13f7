"""Rounds of drafting and verification for the enumeration, and the ways to get them wrong.

`offer`, `NodeWalk` and `BlockWalk` are the very lines that the references run in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from enumeration import Context, Dice, Key, Round, Weights, World

from eesd_kernels import Law
from eesd_kernels.reference.acceptance import NodeWalk, offer
from eesd_kernels.reference.block import BlockWalk


@dataclass(frozen=True)
class Counters:
    """The keys of DESIGN section 4, or with a part left out."""

    round_base: bool = True
    draft_apart: bool = True  # drafts do not race with the target's noise
    siblings_apart: bool = True  # each sibling is tested with a uniform of its own

    def base(self, context: Context, law: Law) -> int:
        return len(context) + 1 if self.round_base and law != Law.COUPLED else 0

    def draft(self, position: int, base: int, parent: int, law: Law) -> Key:
        if law == Law.COUPLED or not self.draft_apart:
            return Key("target", position, base)
        return Key("draft", position, base, parent)

    def target(self, position: int, base: int) -> Key:
        return Key("target", position, base)

    def accept(self, position: int, base: int, sibling: int) -> Key:
        return Key("accept", position, base, sibling if self.siblings_apart else 0)


DESIGN = Counters()


def support(law: Weights) -> list[int]:
    return [x for x, mass in enumerate(law) if mass]


def draw(dice: Dice, key: Key, q: Weights, n: int, law: Law) -> list[int]:
    """n children from q: the first n of the race, or the n best."""
    n = min(n, len(support(q)))
    if law == Law.DETERMINISTIC:
        return sorted(support(q), key=lambda x: (-q[x], x))[:n]
    left, children = list(q), []
    for _ in range(n):
        children.append(dice.race(key, left))
        left[children[-1]] = Fraction(0)
    return children


def visit(
    dice: Dice,
    p: Weights,
    children: Sequence[int],
    q: Weights,
    rule: Law,
    position: int,
    base: int,
    counters: Counters = DESIGN,
) -> tuple[int, int | None]:
    """The reference's `visit` on rationals: the next token, and which child it is."""
    target = counters.target(position, base)
    if rule == Law.COUPLED:
        token = dice.race(target, p)
        return token, list(children).index(token) if token in children else None
    ids = list(dict.fromkeys(children)) if rule == Law.DETERMINISTIC else support(q)
    weights = [Fraction(1) if rule == Law.DETERMINISTIC else q[x] for x in ids]
    outside = sum((mass for x, mass in enumerate(p) if x not in ids), Fraction(0))
    walk = NodeWalk([p[x] for x in ids], weights, outside, rule)
    accepted = offer(
        walk, ids, children, lambda s: dice.uniform(counters.accept(position, base, s))
    )
    if accepted is not None:
        return children[accepted], accepted
    residual = list(p)
    for x, mass in zip(ids, walk.r, strict=True):
        residual[x] = mass
    return dice.race(target, residual), None


Lengths = Callable[[Context, Context], bool]
"""Whether to draft one more token, after a context and the tokens drafted so far."""


def at_most(length: int) -> Lengths:
    return lambda context, drafted: len(drafted) < length


LENGTHS: dict[str, Lengths] = {
    "1": at_most(1),
    "2": at_most(2),
    "3": at_most(3),
    "by context": lambda context, drafted: len(drafted) < sum(context) % 3,
    "until a 2": lambda context, drafted: len(drafted) < 3 and 2 not in drafted,
}


def linear_rounds(
    lengths: Lengths, drawn: Law, rule: Law, counters: Counters = DESIGN
) -> Callable[[World], Round]:
    """Drafted by law `drawn`, verified token by token under `rule`."""

    def rounds(world: World) -> Round:
        def one_round(dice: Dice, context: Context) -> Context:
            base, run = counters.base(context, drawn), ()
            while True:
                place, here = len(context) + len(run), context + run
                # Drawn when the walk comes by: later drafts are independent of it.
                more, q = lengths(context, run), world.law("q", here)
                key = counters.draft(place, base, 0, drawn)
                children = draw(dice, key, q, 1, drawn) if more else []
                token, accepted = visit(
                    dice, world.law("p", here), children, q, rule, place, base, counters
                )
                run = (*run, token)
                if accepted is None:
                    return run

        return one_round

    return rounds


def block_rounds(
    lengths: Lengths,
    drawn: Law = Law.BLOCK,
    counters: Counters = DESIGN,
    kept: Callable[[int, Weights], bool] = lambda token, q: True,
) -> Callable[[World], Round]:
    """The reference's block rule on rationals. A draft ends before a token that is not kept."""

    def rounds(world: World) -> Round:
        def one_round(dice: Dice, context: Context) -> Context:
            base, start = counters.base(context, Law.BLOCK), len(context)
            drafted, walk = (), BlockWalk()
            while lengths(context, drafted):
                here, place = context + drafted, start + len(drafted)
                p, q = world.law("p", here), world.law("q", here)
                (token,) = draw(dice, counters.draft(place, base, 0, drawn), q, 1, drawn)
                if not kept(token, q):
                    break
                ids = support(q)
                outside = sum((mass for x, mass in enumerate(p) if x not in ids), Fraction(0))
                walk.add([p[x] for x in ids], [q[x] for x in ids], outside, ids.index(token))
                drafted = (*drafted, token)
            m = walk.accepted(lambda i: dice.uniform(counters.accept(start + i - 1, base, 0)))
            run = drafted[:m]
            residual = list(world.law("p", context + run))
            if m < len(drafted):
                q = world.law("q", context + run)
                residual = [walk.stands[m] * mass for mass in residual]
                for x, mass in zip(support(q), walk.residual[m], strict=True):
                    residual[x] = mass
            return (*run, dice.race(counters.target(start + m, base), residual))

        return one_round

    return rounds


Offered = Callable[[list[int], Weights], list[int]]
"""What becomes of the children between the draw and the walk: for the twins."""


def tree_rounds(
    shape: Sequence[int],
    drawn: Law,
    rule: Law,
    counters: Counters = DESIGN,
    offered: Offered = lambda children, q: children,
) -> Callable[[World], Round]:
    """`shape[d]` children for each node at depth d; a node's id is its path, so ids are apart."""

    def rounds(world: World) -> Round:
        def one_round(dice: Dice, context: Context) -> Context:
            base, run, node = counters.base(context, drawn), (), 1
            while True:
                place, here, depth = len(context) + len(run), context + run, len(run)
                n, q = shape[depth] if depth < len(shape) else 0, world.law("q", here)
                key = counters.draft(place, base, node, drawn)
                children = offered(draw(dice, key, q, n, drawn), q) if n else []
                token, accepted = visit(
                    dice, world.law("p", here), children, q, rule, place, base, counters
                )
                run = (*run, token)
                if accepted is None:
                    return run
                node = 4 * node + accepted

        return one_round

    return rounds
