"""Logits to accepted tokens, K = 5: beside one softmax of the logits, composed PyTorch, FlashInfer.

bf16 logits and sparse draft laws of eight ids, rotated past three times the L2 where 64 sets reach
that. Composed: the rule over dense softmaxes of the target's and the draft's logits. FlashInfer:
its chain op with its two softmaxes, where it can be imported.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import Call, arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import Law, reference, verify_linear

DRAFTS, KEPT = 5, 8
SIZES = [(vocab, batch) for vocab in (32_000, 128_256) for batch in (1, 8, 64)]
LAWS = ("sampled", "coupled", "block", "greedy")
CHECKED = 8  # sequences of each case


class Inputs(NamedTuple):
    """One set: the op's arguments, results to write to, and the draft's own logits."""

    given: tuple[Tensor | None, ...]
    out: tuple[Tensor, Tensor, Tensor]
    draft_logits: Tensor


def inputs(vocab: int, batch: int, law: str) -> Inputs:
    """Logits of a random target, a draft near it; q over the draft's eight best ids."""
    shape = (batch, DRAFTS + 1, vocab)
    target = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 3)
    draft = target[:, :DRAFTS] + torch.randn_like(target[:, :DRAFTS])
    values, q_ids = draft.float().topk(KEPT)
    q = values.softmax(-1)
    drawn = torch.multinomial(q.flatten(0, 1), 1).view(batch, DRAFTS, 1)
    each = torch.arange(batch, device="cuda")
    place = (each * 7 + 3).int()
    number = {"coupled": Law.COUPLED, "block": Law.BLOCK}.get(law, Law.SAMPLED)
    given = (
        target, q_ids.gather(2, drawn)[..., 0].int(), torch.full_like(place, DRAFTS),
        q_ids.int(), q, torch.full_like(place, int(number)),
        torch.full((batch,), 0.0 if law == "greedy" else 1.0, device="cuda"), None, None, None,
        each * 1_234_567 + 89, place, place,
    )  # fmt: skip
    out = (torch.empty_like(place), place.new_empty(batch, DRAFTS + 1), torch.empty_like(place))
    return Inputs(given, out, draft)


def equals_the_reference(case: Inputs) -> bool:
    """Ids of some sequences; theirs are float64."""
    got = verify_linear(*case.given)
    some = [None if x is None else x[:CHECKED] for x in case.given]
    want = reference.verify_linear(*some)
    return all(torch.equal(a[:CHECKED], b) for a, b in zip(got, want, strict=True))


def bytes_moved(vocab: int, batch: int) -> int:
    """Each row of bf16 logits once; q's ids and weights; ids, lengths, settings, results."""
    return batch * (2 * (DRAFTS + 1) * vocab + 8 * DRAFTS * KEPT + 8 * DRAFTS + 4 * 11)


@cache
def counting(n: int) -> Tensor:
    return torch.arange(n, device="cuda")


def composed(case: Inputs, law: str) -> Tensor:
    """The rule in PyTorch's own ops, over dense laws."""
    logits, ids = case.given[0], case.given[1]
    assert logits is not None
    assert ids is not None
    batch = logits.shape[0]
    each, level = counting(batch), counting(DRAFTS + 1)
    if law == "greedy":
        tokens = logits.argmax(-1)
        passes = tokens[:, :DRAFTS] == ids
    else:
        p = torch.softmax(logits.float(), -1)
    if law == "coupled":
        tokens = (p / torch.empty_like(p).exponential_()).argmax(-1)
        passes = tokens[:, :DRAFTS] == ids
    if law == "sampled":
        q = torch.softmax(case.draft_logits.float(), -1)
        at = ids.long()[..., None]
        p_t, q_t = p[:, :DRAFTS].gather(2, at)[..., 0], q.gather(2, at)[..., 0]
        passes = torch.rand(batch, DRAFTS, device="cuda") * q_t < p_t
    m = passes.int().cumprod(1).sum(1)
    if law == "sampled":
        rejected = (m < DRAFTS)[:, None]
        r = (p[each, m] - q[each, m.clamp(max=DRAFTS - 1)] * rejected).clamp(min=0)
        token = (r / torch.empty_like(r).exponential_()).argmax(-1)
    else:
        token = tokens[each, m]
    kept = torch.nn.functional.pad(ids, (0, 1), value=-1)
    kept = torch.where(level < m[:, None], kept, -1)
    return torch.where(level == m[:, None], token.int()[:, None], kept)


def flashinfer_chain() -> Callable[[Inputs], Any] | None:
    """FlashInfer's softmaxes and chain op, or None where it cannot be imported."""
    try:
        from flashinfer.sampling import chain_speculative_sampling, softmax
    except Exception as error:
        print(f"flashinfer: n/a ({type(error).__name__})")
        return None

    def run(case: Inputs) -> Any:
        logits, ids = case.given[0], case.given[1]
        assert logits is not None
        p, q = (softmax(x.flatten(0, 1).float()).view(x.shape) for x in (logits, case.draft_logits))
        return chain_speculative_sampling(q, ids, p)

    return run


def works(call: Call) -> bool:
    """Whether a peer runs, and in a graph."""
    try:
        call()
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"flashinfer: n/a ({type(error).__name__}: {str(error)[:80]})")
        return False
    return True


def contenders_of(sets: list[Inputs], law: str, chain: Callable[[Inputs], Any] | None) -> Any:
    """Names and the calls of each."""

    def calls(function: Callable[[Inputs], Any]) -> list[Call]:
        return [lambda s=s: function(s) for s in sets]

    found = {
        "us": calls(lambda s: verify_linear(*s.given, out=s.out)),
        "softmax": calls(lambda s: torch.softmax(s.given[0].float(), -1)),
    }
    if law != "block":
        found["composed"] = calls(lambda s: composed(s, law))
    if law == "sampled" and chain is not None and works(lambda: chain(sets[0])):
        found["flashinfer"] = calls(chain)
    return found


def main() -> None:
    """Measure, print and write `verify_linear.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("verify_linear is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth, chain = read_bandwidth(), flashinfer_chain()
    rows: list[dict[str, Any]] = []
    for vocab, batch in SIZES:
        moved = bytes_moved(vocab, batch)
        for law in LAWS:
            sets = [inputs(vocab, batch, law) for _ in range(input_sets(moved, "cuda"))]
            equal = all(equals_the_reference(case) for case in sets[:2])
            times = measure(contenders_of(sets, law, chain), "cuda", quick=args.quick)
            ours = times.pop("us")
            accepted = torch.cat([s.out[0] for s in sets]).float().mean()
            rows.append({
                "V": vocab, "B": batch, "K": DRAFTS, "k": KEPT, "dtype": "bfloat16", "law": law,
                **ours.row(), "bytes": moved,
                "ceiling_share": round(moved / bandwidth / ours.us, 4),
                **{f"us_{name}": round(t.us, 3) for name, t in times.items()},
                **{f"x_{name}": round(ours.us / t.us, 4) for name, t in times.items()},
                "accepted": round(float(accepted), 2), "rows_equal": equal,
            })  # fmt: skip
    print_table(rows)
    print(f"read bandwidth {bandwidth * 1e-6:.3f} TB/s")
    print(write_results("verify_linear", rows, out=args.out))


if __name__ == "__main__":
    main()
