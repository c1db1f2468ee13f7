"""Text from the actual ops in many rows at once, in a small world of rational laws."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from enumeration import Context, Joint, Weights
from scipy import stats
from torch import Tensor

import eesd_kernels as ek
from eesd_kernels import Law, reference
from eesd_kernels._cpu import philox_words_cpu

START = 10
"""Position of the first pending token, so that no round base is 0 by chance."""


class Markov:
    """A `World` whose laws depend on the last token alone (0 at the start).

    q is sparse: each row has as many ids as the first, so some of p's mass lies outside them.
    """

    def __init__(self, p: Sequence[Sequence[int]], q: Sequence[Sequence[int]]) -> None:
        self.vocab, self.k = len(p), sum(w > 0 for w in q[0])
        self._laws = {
            which: [tuple(Fraction(w, sum(row)) for w in row) for row in rows]
            for which, rows in (("p", p), ("q", q))
        }
        self.p, self.q = (torch.tensor(rows, dtype=torch.float64).log().float() for rows in (p, q))

    def law(self, which: str, context: Context) -> Weights:
        return self._laws[which][context[-1] if context else 0]


THREE = Markov(p=((5, 2, 2), (1, 1, 1), (5, 5, 8)), q=((0, 1, 1), (1, 0, 1), (3, 8, 0)))
FOUR = Markov(
    p=((2, 2, 8, 2), (5, 2, 1, 8), (2, 1, 8, 1), (5, 1, 3, 1)),
    q=((8, 0, 1, 5), (8, 2, 0, 5), (1, 0, 8, 5), (5, 3, 0, 1)),
)
"""Of some hundreds, THREE shows a missing round base best, FOUR a residual of unweighed parts."""

OpRound = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(last token, its position, seed), each `[n]`, to (num_accepted `[n]`, token ids `[n, W]`)."""


def _settings(n: int, law: Law) -> tuple[Tensor, ...]:
    """law, temperature, top_k, top_p, min_p."""
    off = torch.zeros(n, dtype=torch.int32)
    return off + int(law), torch.ones(n), off, torch.ones(n), torch.zeros(n)


def _draw(
    world: Markov, last: Tensor, n: int, law: Law, place: tuple[Tensor, Tensor, Tensor], parent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """n children of each row: ids, and q as ids and probabilities."""
    values, ids = world.q[last].topk(world.k)
    ids = ids.to(torch.int32)
    rows = _settings(len(last), law)
    node = torch.full_like(rows[0], parent)
    children, q = ek.sample_draft(values, ids, rows[1], rows[0], n, *place, parent=node)
    return children, ids, q


def linear_op(
    world: Markov, drafts: int, drawn: Law, rule: Law, *, round_base: bool = True
) -> OpRound:
    def one_round(last: Tensor, at: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        base = at if round_base else torch.zeros_like(at)
        token, ids, q_ids, q_probs, rows = last, [], [], [], [world.p[last]]
        for j in range(drafts):
            drawn_now = _draw(world, token, 1, drawn, (seed, at + j + 1, base), 0)
            token = drawn_now[0][:, 0].long()
            ids.append(drawn_now[0][:, 0])
            q_ids.append(drawn_now[1])
            q_probs.append(drawn_now[2])
            rows.append(world.p[token])
        n = len(last)
        empty = torch.empty(n, 0, dtype=torch.int32)
        accepted, tokens, _ = ek.verify_linear(
            torch.stack(rows, 1),
            torch.stack(ids, 1) if ids else empty,
            torch.full((n,), drafts, dtype=torch.int32),
            torch.stack(q_ids, 1) if ids else empty[..., None],
            torch.stack(q_probs, 1) if ids else empty[..., None].float(),
            *_settings(n, rule), seed, at, base,
        )  # fmt: skip
        return accepted, tokens

    return one_round


def tree_op(
    world: Markov, shape: Sequence[int], drawn: Law, rule: Law, *, resort: bool = False
) -> OpRound:
    """`shape[d]` children for each node at depth d; `resort` offers them by id."""

    def one_round(last: Tensor, at: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        ids, parent, level = [last.int()], [-1], [0]
        q_ids, q_probs = {}, {}
        for depth, n in enumerate(shape):
            nodes, level = level, []
            for node in nodes:
                place = (seed, at + depth + 1, at)
                children, q_ids[node], q_probs[node] = _draw(
                    world, ids[node].long(), n, drawn, place, node
                )
                if resort:
                    children = children.sort(1).values
                for sibling in range(n):
                    level.append(len(ids))
                    ids.append(children[:, sibling])
                    parent.append(node)
        rows, nodes = torch.stack(ids, 1), len(ids)
        leaf_ids, leaf_q = torch.full_like(q_ids[0], -1), torch.zeros_like(q_probs[0])
        accepted, _, tokens, _ = reference.verify_tree(
            world.p[rows.long()],
            rows,
            torch.tensor(parent, dtype=torch.int32).expand(len(last), -1),
            torch.full((len(last),), nodes, dtype=torch.int32),
            torch.stack([q_ids.get(i, leaf_ids) for i in range(nodes)], 1),
            torch.stack([q_probs.get(i, leaf_q) for i in range(nodes)], 1),
            *_settings(len(last), rule), seed, at, at, words=philox_words_cpu,
        )  # fmt: skip
        return accepted, tokens

    return one_round


def texts(one_round: OpRound, tokens: int, draws: int) -> Tensor:
    """`[draws, tokens]`, each row by rounds of its own, with its own seed."""
    out = torch.full((draws, tokens + 16), -1)
    length, seed = torch.zeros(draws, dtype=torch.int64), torch.arange(draws)
    while bool((length < tokens).any()):
        rows = (length < tokens).nonzero()[:, 0]
        at = length[rows]
        last = torch.where(at > 0, out[rows, (at - 1).clamp(min=0)], 0)
        accepted, ids = one_round(last, (at + START).int(), seed[rows])
        out[rows[:, None], at[:, None] + torch.arange(ids.shape[1])] = ids.long()
        length[rows] += accepted + 1
    return out[:, :tokens]


def pvalue(text: Tensor, law: Joint) -> float:
    """Chi-square of the joint table of all tokens of a text against an exact law."""
    cells = {x: i for i, x in enumerate(law)}
    counts = [0] * len(cells)
    for row in text.tolist():
        counts[cells[tuple(row)]] += 1
    return float(stats.chisquare(counts, [float(x) * len(text) for x in law.values()]).pvalue)
