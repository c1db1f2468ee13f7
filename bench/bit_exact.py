"""Ids of EESD against plain decoding's in bfloat16 on a GPU: all of them, every token.

Greedy ids must equal plain decoding's; with `coupled`, sampled ids plain sampling's of the same
seed. The demo model on real prompts, and synthetic models of a named shape, of several agreements,
on random ones; alone and in batches of eight, with constant and Thompson draft lengths. Plain
decoding is itself compared over the batch sizes. Exits with 1 where ids differ.
"""

import argparse
import sys
from itertools import zip_longest

import torch
from torch import Tensor

import eesd
from bench.engine import Budget, engine_arguments, prepare, random_prompts, synthetic
from bench.harness import print_table
from bench.prompts import add_data_argument, left_padded, load_prompts
from bench.results import write_results

MODES = {
    "greedy": {},
    "coupled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
}
SCHEDULES = {"default": ("thompson", 8), "constant": ("constant", 5)}
KEY = ("shape", "agreement", "B", "mode", "schedule", "first")


def main() -> None:
    """Measure and write `bit_exact.json`."""
    parser = engine_arguments(__doc__.splitlines()[0], "llama-2-13b")
    add_data_argument(parser)
    parser.add_argument("--models", nargs="+", default=["demo", "shape"])
    parser.add_argument("--sets", nargs="+", default=["gsm8k_test", "humaneval"])
    parser.add_argument("--prompts", type=int, default=200, help="of the demo model")
    parser.add_argument("--shape-prompts", type=int, default=20, help="of each synthetic model")
    parser.add_argument("--alone", type=int, default=20, help="of these, the first so many alone")
    parser.add_argument("--first", type=int, default=0, help="prompt of a synthetic model")
    parser.add_argument("--agreements", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--plain-batch", type=int, help="decode plainly in this batch size alone, not in each"
    )
    args = parser.parse_args()
    prepare(args)
    models = ("demo" in args.models) + ("shape" in args.models) * len(args.agreements)
    count = models * len(args.batches) * len(args.modes)
    budget, rows = Budget(args.seconds, count), list[dict[str, object]]()
    if "demo" in args.models:
        dtype = "bfloat16" if args.device == "cuda" else "float32"
        demo = eesd.load("demo", device=args.device, dtype=dtype)
        sets = [load_prompts(args.data, name, demo, args.new_tokens) for name in args.sets]
        turns = zip_longest(*sets)
        mixed = [p for turn in turns for p in turn if p is not None][: args.prompts]
        _run(demo, {"shape": "demo"}, mixed, len(mixed), args, budget, rows)
        demo.captures.clear()
    for agreement in args.agreements if "shape" in args.models else ():
        if budget.spent():
            break
        model = synthetic(args, agreement, args.exit_layer)
        prompts = random_prompts(model, [64 + 7 * n for n in range(args.shape_prompts)], 1)
        name = {"shape": args.shape, "weights": "synthetic", "agreement": agreement}
        if args.first:
            name["first"] = args.first
        _run(model, name, prompts[args.first :], args.alone, args, budget, rows)
        del model
    sys.exit(not all(row["ids_equal"] for row in rows))


@torch.inference_mode()
def _run(
    model: eesd.Model,
    name: dict[str, object],
    every: list[Tensor],
    alone: int,
    args: argparse.Namespace,
    budget: Budget,
    rows: list[dict[str, object]],
) -> None:
    """All prompts in batches, the first `alone` of them one by one."""
    plain: dict[str, _Texts] = {}
    for batch in args.batches:
        prompts = every[:alone] if batch == 1 else every
        for mode in args.modes:
            if budget.spent():
                return
            base = plain.get(mode) if args.plain_batch else None
            if base is None:
                size = args.plain_batch or batch
                base = _Texts(model, prompts, size, args, num_assistant_tokens=0, **MODES[mode])
            before = plain.setdefault(mode, base)
            same = [torch.equal(a, b) for a, b in zip(base.ids, before.ids, strict=False)]
            for rule, (schedule, drafts) in SCHEDULES.items():
                texts = _Texts(
                    model, prompts, batch, args, num_assistant_tokens_schedule=schedule,
                    num_assistant_tokens=drafts,
                    assistant_sampling="coupled" if mode == "coupled" else "rejection",
                    **MODES[mode],
                )  # fmt: skip
                pairs = zip(texts.ids, base.ids[: len(prompts)], strict=True)
                equal = [torch.equal(a, b) for a, b in pairs]
                rows.append(
                    {
                        **name,
                        "dtype": str(model.backbone.dtype).removeprefix("torch."),
                        "B": batch,
                        "prompts": len(prompts),
                        "new_tokens": args.new_tokens,
                        "mode": mode,
                        "schedule": rule,
                        "ids_equal": all(equal),
                        "mismatches": len(equal) - sum(equal),
                        "plain_B": base.batch,
                        "plain_mismatches_across_batches": None
                        if before is base
                        else len(same) - sum(same),
                        "tokens": texts.tokens,
                        "mean_acceptance_length": round(texts.tokens_a_round, 3),
                        "captured": texts.captured and base.captured,
                    }
                )
                print_table(rows[-1:])
                write_results("bit_exact", rows, out=args.out, key=KEY)
            budget.case_done()


class _Texts:
    """New ids of each prompt, in batches of one size: a prompt again fills the last one up."""

    def __init__(
        self,
        model: eesd.Model,
        prompts: list[Tensor],
        batch: int,
        args: argparse.Namespace,
        **options: object,
    ) -> None:
        self.ids, self.batch = list[Tensor](), batch
        self.captured, self.tokens = True, 0
        rounds = accepted = 0
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            live = len(some)
            some = some + some[-1:] * (batch - live)
            ids, mask = left_padded([p.cpu() for p in some])
            out = eesd.generate(
                model, ids.to(args.device), mask.to(args.device), max_new_tokens=args.new_tokens,
                seed=[1000 + start + i for i in range(batch)], pad_token_id=0,
                return_dict_in_generate=True, **options,
            )  # fmt: skip
            new = out.sequences[:live, ids.shape[1] :].cpu()
            # Batches are padded to their longest text.
            self.ids += list(torch.nn.functional.pad(new, (0, args.new_tokens - new.shape[1])))
            stats = out.speculative
            rounds += stats.num_spec_steps
            accepted += stats.num_accepted_draft_tokens
            self.tokens += stats.num_spec_steps + stats.num_accepted_draft_tokens
            self.captured &= stats.engine.captured
        self.tokens_a_round = 1 + accepted / max(rounds, 1)


if __name__ == "__main__":
    main()
