"""Children from k candidates beside an empty kernel, and what the draw adds to `exit_topk`.

float32 candidates; sets rotate, though all of them lie in the L2. exit_draft is one head in bf16
(V 32,000, H 4,096), weights rotated past three times the L2, against exit_topk on the same inputs.
Composed: a softmax and a race of PyTorch, by argmax or topk.
"""

from typing import Any

import torch
from torch import Tensor

from bench.empty_kernel import empty_launches
from bench.harness import Call, arguments, input_sets, measure, print_table
from bench.results import write_results
from eesd_kernels import Law, reference
from eesd_kernels.exit_draft import exit_draft_op
from eesd_kernels.exit_topk import exit_topk_op
from eesd_kernels.sample_draft import sample_draft_op

LAWS = {"sampled": (Law.SAMPLED, 0.8), "coupled": (Law.COUPLED, 0.8), "greedy": (Law.SAMPLED, 0.0)}
CASES = [(rows, k, n) for rows in (1, 64) for k, n in ((8, 1), (8, 4), (64, 1), (64, 8))]
HEAD = (32_000, 4_096)
EPS = 1e-5
MARGIN = 1e-6  # of q: float32 sums against float64


def settings(rows: int, law: str) -> list[Tensor]:
    """temperature, law; seed, position, base."""
    number, temperature = LAWS[law]
    each = torch.arange(rows, device="cuda")
    place = (7 * each + 3).int()
    return [
        torch.full((rows,), temperature, device="cuda"), torch.full_like(place, int(number)),
        each * 1_234_567 + 89, place, place,
    ]  # fmt: skip


def candidates(rows: int, k: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, k, device="cuda").mul_(2).sort(-1, descending=True).values
    return values, torch.rand(rows, 32_000, device="cuda").topk(k).indices.int()


def given(rows: int, k: int, n: int, law: str) -> tuple[Any, ...]:
    """The arguments of sample_draft."""
    temperature, number, *place = settings(rows, law)
    return *candidates(rows, k), temperature, number, n, *place, None


def equals_the_reference(case: tuple[Any, ...]) -> bool:
    """Ids in their order; q within rounding."""
    child, q = sample_draft_op(*case)
    want, law = reference.sample_draft(*case)
    torch.testing.assert_close(q, law.float(), rtol=MARGIN, atol=MARGIN)
    return torch.equal(child, want)


def composed(case: tuple[Any, ...]) -> Tensor:
    """Without replacement, in PyTorch's own ops; `multinomial` would wait for the device."""
    values, ids, temperature, _, n = case[:5]
    q = (values / temperature[:, None]).softmax(-1)
    race = q / torch.empty_like(q).exponential_()
    best = race.argmax(-1, keepdim=True) if n == 1 else race.topk(n).indices
    return ids.gather(1, best)


def draws(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for count, k, n in CASES:
        for law in LAWS:
            moved = count * (12 * k + 4 * n + 24)
            sets = [given(count, k, n, law) for _ in range(input_sets(moved, "cuda"))]
            equal = all(equals_the_reference(case) for case in sets[:4])
            contenders: dict[str, list[Call]] = {
                "us": [lambda x=x: sample_draft_op(*x) for x in sets],
                "empty": empty_launches(),
            }
            if law == "sampled":
                contenders["composed"] = [lambda x=x: composed(x) for x in sets]
            times = measure(contenders, "cuda", quick=quick)
            ours, empty = times["us"], times["empty"].us
            rows.append({
                "op": "sample_draft", "R": count, "k": k, "n": n, "law": law, **ours.row(),
                "us_empty": round(empty, 3), "us_over_empty": round(ours.us - empty, 3),
                "bytes": moved,
                **({
                    "us_composed": round(times["composed"].us, 3),
                    "x_composed": round(ours.us / times["composed"].us, 4),
                } if law == "sampled" else {}),
                "ids_equal": equal,
            })  # fmt: skip
    return rows


def behind_the_head(quick: bool) -> list[dict[str, Any]]:
    vocab, size = HEAD
    weights = [
        torch.randn(vocab, size, device="cuda").mul_(3 * size**-0.5).bfloat16()
        for _ in range(input_sets(2 * vocab * size, "cuda"))
    ]
    norm = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    rows = []
    for count, k, n in CASES:
        x = torch.randn(count, size, device="cuda").bfloat16()
        temperature, law, *place = settings(count, "sampled")
        heads = [(x, weight, k, norm, EPS) for weight in weights]
        drafts = [(*head, temperature, law, n, *place, None) for head in heads]
        *kept, child, q = exit_draft_op(*drafts[0])
        apart = sample_draft_op(*kept[:2], temperature, law, n, *place, None)
        equal = all(map(torch.equal, (*kept, child, q), (*exit_topk_op(*heads[0]), *apart)))
        contenders: dict[str, list[Call]] = {
            "us": [lambda a=a: exit_draft_op(*a) for a in drafts],
            "exit_topk": [lambda a=a: exit_topk_op(*a) for a in heads],
        }
        times = measure(contenders, "cuda", quick=quick)
        ours, without = times["us"], times["exit_topk"].us
        rows.append({
            "op": "exit_draft", "V": vocab, "H": size, "R": count, "k": k, "n": n, "law": "sampled",
            "dtype": "bfloat16", **ours.row(), "us_exit_topk": round(without, 3),
            "us_over_exit_topk": round(ours.us - without, 3),
            "x_exit_topk": round(ours.us / without, 4), "bytes_equal": equal,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print and write `sample_draft.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("sample_draft is measured on a CUDA GPU; on a CPU it is no round's cost")
        return
    torch.manual_seed(0)
    rows, heads = draws(args.quick), behind_the_head(args.quick)
    print_table(rows)
    print_table(heads)
    print(write_results("sample_draft", rows + heads, out=args.out))


if __name__ == "__main__":
    main()
