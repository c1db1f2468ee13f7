"""The controller's ops: draft lengths of a batch in one launch, looks, posterior updates.

As decoding calls them, with a credit where the rule takes one (rows without: `cost_unbound`).
GPU: CUDA-graph replays beside an empty kernel in a graph of its own, and what is above it. CPU: the
op as the decoding loop calls it, beside the same in composed PyTorch (the reference).
"""

import torch

from bench.harness import Call, arguments, measure, print_table
from bench.results import write_results
from eesd_kernels import Rule, reference, thompson_draft_length
from eesd_kernels.thompson_draft_length import thompson_draft_length_op
from eesd_kernels.thompson_look import thompson_look_op
from eesd_kernels.thompson_update import thompson_update_op

BATCHES = [1, 64, 256]
DRAFT = 8
BUCKETS = 8
SETS = 8  # different inputs; a few hundred bytes, which no L2 misses in real use either


def cases(batch: int, device: str, seed: int) -> dict[str, tuple[object, tuple, object]]:
    """op name: (op, arguments, reference)."""
    g = torch.Generator().manual_seed(seed)

    def to(x: torch.Tensor) -> torch.Tensor:
        return x.to(device)

    alpha, beta = (to(torch.rand(batch, generator=g) * 8 + 1) for _ in range(2))
    alphas, betas = (to(torch.rand(batch, BUCKETS, generator=g) * 2 + 0.2) for _ in range(2))
    cap = to(torch.full((batch,), DRAFT, dtype=torch.int32))
    costs = to(1 + 0.08 * torch.arange(DRAFT + 1))
    key = to(torch.arange(batch)), to(torch.arange(batch, dtype=torch.int32) + 100 * seed)
    look = (
        to(torch.zeros(batch, dtype=torch.int32)),
        to(torch.zeros(batch, DRAFT, dtype=torch.int32)),
        to(torch.ones(batch, 3)),
        to(torch.ones(batch, dtype=torch.int32)),
    )
    top = to(torch.rand(batch, generator=g))
    credit = to(torch.full((batch,), 1e6))  # never spent, however often the graph is replayed
    outcome = cap.clone(), to(torch.randint(DRAFT, (batch,), generator=g, dtype=torch.int32))
    plan = reference.thompson_draft_length
    return {
        **{
            rule.name.lower(): (
                thompson_draft_length_op,
                (*((alphas, betas) if rule == Rule.CALIBRATED else (alpha, beta)), cap, int(rule),
                 costs, *key, credit if rule in (Rule.COST, Rule.CALIBRATED) else None),
                plan,
            )
            for rule in Rule
        },
        "cost_unbound": (
            thompson_draft_length_op, (alpha, beta, cap, int(Rule.COST), costs, *key, None), plan
        ),
        "look": (
            thompson_look_op, (alphas, betas, cap, costs, 0.03, *key, 0, top, *look, credit),
            reference.thompson_look,
        ),
        "update": (
            thompson_update_op,
            (alpha, beta, alpha.clone(), beta.clone(), *outcome, 0.98, None, credit, 1.01, 1e9),
            reference.thompson_update,
        ),
    }  # fmt: skip


def check(device: str) -> None:
    """Lengths on this device against the CPU's, which the tests hold to the reference."""
    for name, (_, arguments_, _) in cases(64, device, 3).items():
        if name in ("look", "update"):
            continue
        # Copies: the credit is written.
        on_cpu = [x.to("cpu", copy=True) if isinstance(x, torch.Tensor) else x for x in arguments_]
        got = thompson_draft_length(*arguments_)
        assert torch.equal(got.cpu(), thompson_draft_length(*on_cpu)), name


def main() -> None:
    """Measure, print and write `thompson.json`."""
    args = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    check(args.device)
    rows = []
    for batch in BATCHES:
        sets = [cases(batch, args.device, seed) for seed in range(SETS)]
        for name in sets[0]:
            contenders: dict[str, list[Call]] = {
                "us": [lambda c=s[name]: c[0](*c[1]) for s in sets]
            }
            if args.device == "cuda":
                contenders["empty"] = [lambda: torch.cuda._sleep(0)] * SETS
            else:
                contenders["composed"] = [lambda c=s[name]: c[2](*c[1]) for s in sets]
            times = measure(contenders, args.device, quick=args.quick)
            ours = times.pop("us")
            row = {
                "op": name, "B": batch, "K": DRAFT, "device": args.device, **ours.row(),
                **{f"us_{other}": round(t.us, 3) for other, t in times.items()},
                **{f"x_{other}": round(ours.us / t.us, 4) for other, t in times.items()},
            }  # fmt: skip
            if "empty" in times:
                row["us_over_empty"] = round(ours.us - times["empty"].us, 3)
            rows.append(row)
    print_table(rows)
    on = "cpu" if args.device == "cpu" else None
    print(write_results("thompson", rows, out=args.out, on=on))


if __name__ == "__main__":
    main()
