"""Logits of a tree of drafts to accepted tokens: beside one softmax of the logits, and composed.

bf16 logits and sparse draft laws of eight ids, rotated past three times the L2 where 64 sets reach
that. Composed PyTorch: the softmax, then the rule level by level over all sequences at once, the
shape of the tree known beforehand, as a graph needs it. Filtered rows stand beside the same softmax
and beside the op without its filters, `x_unfiltered`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import Call, arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import Law, reference, verify_tree

KEPT = 8
WIDTHS = {7: (1, 2, 4), 32: (1, 4, 8, 8, 8, 3), 64: (1, 4, 8, 16, 16, 16, 3)}  # nodes by depth
FILTERS: dict[str, tuple[int, float, float]] = {  # top_k, top_p, min_p
    "top_p": (0, 0.9, 0.0), "top_k top_p": (50, 0.9, 0.0), "min_p": (0, 1.0, 0.05),
}  # fmt: skip
CASES = [
    *((v, b, 32, law, "") for v in (32_000, 128_256) for b in (1, 8, 64)
      for law in ("sampled", "coupled")),
    *((v, 8, 32, law, "") for v in (32_000, 128_256) for law in ("deterministic", "greedy")),
    *((v, 8, t, "sampled", "") for v in (32_000, 128_256) for t in (7, 64)),
    *((v, b, 32, "sampled", name) for v, b in ((32_000, 1), (128_256, 8), (128_256, 64))
      for name in FILTERS),
]  # fmt: skip
CHECKED = 4  # sequences of a set


class Inputs(NamedTuple):
    """One set: the op's arguments, and results to write to."""

    given: tuple[Tensor | None, ...]
    out: tuple[Tensor, Tensor, Tensor, Tensor]


def parents(nodes: int) -> list[int]:
    """Each level's nodes are dealt to the nodes of the level above."""
    parent, above = [-1], [0]
    for width in WIDTHS[nodes][1:]:
        level = [above[i * len(above) // width] for i in range(width)]
        above = list(range(len(parent), len(parent) + width))
        parent += level
    return parent


def inputs(vocab: int, batch: int, nodes: int, law: str, filters: str) -> Inputs:
    """Logits of a random target, drafts near it; q over the draft's eight best ids."""
    target = torch.empty(batch, nodes, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 3)
    best = [(row.float() + torch.randn_like(row.float())).topk(KEPT) for row in target]
    values, q_ids = (torch.stack(part) for part in zip(*best, strict=True))
    q = values.softmax(-1)
    drawn = torch.multinomial(q.flatten(0, 1), KEPT).view(batch, nodes, KEPT)
    parent = parents(nodes)
    sibling = [parent[:i].count(parent[i]) for i in range(nodes)]
    up = torch.tensor([max(p, 0) for p in parent], device="cuda")
    place = drawn[:, up, torch.tensor(sibling, device="cuda")]
    each = torch.arange(batch, device="cuda")
    node_ids = q_ids[each[:, None], up, place].int()
    at = (each * 7 + 3).int()

    def full(value: float) -> Tensor:
        return torch.full((batch,), value, device="cuda")

    number = Law[law.upper()] if law != "greedy" else Law.SAMPLED
    settings: tuple[Tensor | None, ...] = (None, None, None)
    if filters:
        top_k, top_p, min_p = FILTERS[filters]
        settings = full(top_k).int(), full(top_p), full(min_p)
    given = (
        target, node_ids, torch.tensor(parent, device="cuda").int().expand(batch, -1).contiguous(),
        torch.full_like(at, nodes), q_ids.int(), q, torch.full_like(at, int(number)),
        full(float(law != "greedy")), *settings, each * 1_234_567 + 89, at, at,
    )  # fmt: skip
    out = (torch.empty_like(at), torch.empty_like(node_ids), torch.empty_like(node_ids),
           torch.empty_like(at))  # fmt: skip
    return Inputs(given, out)


def equals_the_reference(case: Inputs) -> bool:
    """All results of some sequences; theirs are float64."""
    got = verify_tree(*case.given)
    some = [None if x is None else x[:CHECKED] for x in case.given]
    want = reference.verify_tree(*some)
    return all(torch.equal(a[:CHECKED], b) for a, b in zip(got, want, strict=True))


def bytes_moved(vocab: int, batch: int, nodes: int) -> int:
    """Each row of bf16 logits once; q's ids and weights; tokens, parents, results; settings."""
    return batch * (2 * nodes * vocab + 8 * nodes * KEPT + 4 * nodes * 4 + 4 * 12)


def composed(nodes: int) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """The sampled rule in PyTorch's own ops: accepted counts, and tokens by depth."""
    parent = parents(nodes)
    below = [[i for i in range(nodes) if parent[i] == node] for node in range(nodes)]
    most, depths = max(map(len, below)), len(WIDTHS[nodes])
    table = torch.tensor([b + [nodes] * (most - len(b)) for b in below], device="cuda")

    def run(case: Inputs) -> tuple[Tensor, Tensor]:
        logits, ids, q_ids, q = case.given[0], case.given[1], case.given[4], case.given[5]
        assert logits is not None
        assert ids is not None
        assert q_ids is not None
        assert q is not None
        batch = logits.shape[0]
        each = torch.arange(batch, device="cuda")
        p = torch.softmax(logits.float(), -1)
        tokens = torch.nn.functional.pad(ids, (0, 1), value=-1)
        node = torch.zeros(batch, dtype=torch.long, device="cuda")
        going = torch.ones(batch, dtype=torch.bool, device="cuda")
        accepted = torch.zeros_like(node)
        out = torch.full((batch, depths), -1, device="cuda")
        rest = p[:, 0].clone()
        for depth in range(depths):
            r, w, listed = p[each, node], q[each, node], q_ids[each, node].long()
            step, found = node, torch.zeros_like(going)
            for sibling in range(most if depth + 1 < depths else 0):
                child = table[node, sibling]
                t = tokens[each, child].long()
                here = (listed == t[:, None]) & (child < nodes)[:, None]
                w_t, r_t = (w * here).sum(1), (r.gather(1, listed) * here).sum(1)
                s, w_all = r.sum(1), w.sum(1)
                drawn = here.any(1) & going & ~found
                stands = drawn & (torch.rand(batch, device="cuda") * w_t * s < r_t * w_all)
                fell = (drawn & ~stands)[:, None]
                left = (r.gather(1, listed) - (s / w_all)[:, None] * w).clamp(min=0)
                left = torch.where(here, 0.0, left)
                r = torch.where(fell, r.scatter(1, listed, left), r)
                w = torch.where(fell & here, 0.0, w)
                step, found = torch.where(stands, child, step), found | stands
            rest = torch.where((going & ~found)[:, None], r, rest)
            out[:, depth] = torch.where(found, tokens[each, step], out[:, depth])
            going, node, accepted = going & found, step, accepted + found
        token = (rest / torch.empty_like(rest).exponential_()).argmax(-1)
        return accepted, out.scatter(1, accepted[:, None].clamp(max=depths - 1), token[:, None])

    return run


def contenders_of(sets: list[Inputs], nodes: int, law: str, filters: str) -> Any:
    """Names and the calls of each."""

    def calls(function: Callable[[Inputs], Any]) -> list[Call]:
        return [lambda s=s: function(s) for s in sets]

    found = {
        "us": calls(lambda s: verify_tree(*s.given, out=s.out)),
        "softmax": calls(lambda s: torch.softmax(s.given[0].float(), -1)),
    }
    if filters:
        off = (None, None, None)
        found["unfiltered"] = calls(
            lambda s: verify_tree(*s.given[:8], *off, *s.given[11:], out=s.out)
        )
    elif law == "sampled":
        found["composed"] = calls(composed(nodes))
    return found


def main() -> None:
    """Measure, print and write `verify_tree.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("verify_tree is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = []
    for vocab, batch, nodes, law, filters in CASES:
        moved = bytes_moved(vocab, batch, nodes)
        several = range(input_sets(moved, "cuda"))
        sets = [inputs(vocab, batch, nodes, law, filters) for _ in several]
        equal = all(equals_the_reference(case) for case in sets[:2])
        times = measure(contenders_of(sets, nodes, law, filters), "cuda", quick=args.quick)
        ours = times.pop("us")
        accepted = torch.cat([s.out[0] for s in sets]).float().mean()
        rows.append({
            "V": vocab, "B": batch, "T": nodes, "k": KEPT, "dtype": "bfloat16", "law": law,
            **({"filters": filters} if filters else {}), **ours.row(), "bytes": moved,
            "ceiling_share": round(moved / bandwidth / ours.us, 4),
            **{f"us_{name}": round(t.us, 3) for name, t in times.items()},
            **{f"x_{name}": round(ours.us / t.us, 4) for name, t in times.items()},
            "accepted": round(float(accepted), 2), "rows_equal": equal,
        })  # fmt: skip
        del sets
    print_table(rows)
    print(f"read bandwidth {bandwidth * 1e-6:.3f} TB/s")
    print(write_results("verify_tree", rows, out=args.out))


if __name__ == "__main__":
    main()
