"""Ids of EESD against plain decoding's in bfloat16 on a GPU: all of them, every token.

Greedy ids must equal plain decoding's; with `coupled`, sampled ids plain sampling's of the same
seed. The demo model on real prompts, and a synthetic model of a named shape on random ones; alone
and in batches of eight, with constant and Thompson draft lengths.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import eesd
from bench.harness import print_table
from bench.prompts import add_data_argument, left_padded, load_prompts
from bench.results import write_results

MODES = {
    "greedy": {},
    "coupled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
}


def main() -> None:
    """Measure and write `bit_exact.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--sets", nargs="+", default=["gsm8k_test", "humaneval"])
    parser.add_argument("--prompts", type=int, default=200, help="of the demo model")
    parser.add_argument("--shape", default="llama-2-13b", help="synthetic model; '' for none")
    parser.add_argument("--shape-prompts", type=int, default=20)
    parser.add_argument("--agreement", type=float, default=0.75)
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    demo = eesd.load("demo", device="cuda", dtype="bfloat16")
    sets = [load_prompts(args.data, name, demo, args.new_tokens) for name in args.sets]
    mixed = [p for pair in zip(*sets, strict=False) for p in pair]
    _run(demo, "demo", mixed[: args.prompts], args, rows)
    if args.shape:
        model = eesd.synthetic(
            args.shape, agreement=args.agreement, exit_layer=args.exit_layer, device="cuda"
        )
        generator = torch.Generator().manual_seed(1)
        prompts = [
            torch.randint(3, model.config.vocab_size, (64 + 7 * n,), generator=generator).cuda()
            for n in range(args.shape_prompts)
        ]
        _run(model, args.shape, prompts, args, rows)


def _run(
    model: eesd.Model,
    shape: str,
    prompts: list[Tensor],
    args: argparse.Namespace,
    rows: list[dict[str, object]],
) -> None:
    for batch in args.batches:
        for mode, options in MODES.items():
            base = _Texts(model, prompts, batch, args, num_assistant_tokens=0, **options)
            for schedule in ("thompson", "constant"):
                texts = _Texts(
                    model, prompts, batch, args, num_assistant_tokens_schedule=schedule,
                    num_assistant_tokens=8 if schedule == "thompson" else 5,
                    assistant_sampling="coupled" if mode == "coupled" else "rejection", **options,
                )  # fmt: skip
                equal = [torch.equal(a, b) for a, b in zip(texts.ids, base.ids, strict=True)]
                rows.append(
                    {
                        "shape": shape,
                        "dtype": "bfloat16",
                        "B": batch,
                        "prompts": len(prompts),
                        "new_tokens": args.new_tokens,
                        "mode": mode,
                        "schedule": "default" if schedule == "thompson" else schedule,
                        "ids_equal": all(equal),
                        "mismatches": len(equal) - sum(equal),
                        "mean_acceptance_length": round(texts.tokens_a_round, 3),
                    }
                )
                print_table(rows[-1:])
                write_results("bit_exact", rows, out=args.out)


class _Texts:
    """New ids of each prompt, in batches."""

    def __init__(
        self,
        model: eesd.Model,
        prompts: list[Tensor],
        batch: int,
        args: argparse.Namespace,
        **options: object,
    ) -> None:
        self.ids: list[Tensor] = []
        rounds = accepted = 0
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            ids, mask = left_padded([p.cpu() for p in some])
            out = eesd.generate(
                model, ids.cuda(), mask.cuda(), max_new_tokens=args.new_tokens,
                seed=[1000 + start + i for i in range(len(some))],
                return_dict_in_generate=True, **options,
            )  # fmt: skip
            assert isinstance(out, eesd.GenerateOutput)
            self.ids += list(out.sequences[:, ids.shape[1] :].cpu())
            rounds += out.speculative.num_spec_steps
            accepted += out.speculative.num_accepted_draft_tokens
        self.tokens_a_round = 1 + accepted / max(rounds, 1)


if __name__ == "__main__":
    main()
