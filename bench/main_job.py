"""The main job on this machine, on its CPU unless told otherwise: EESD, plain, and transformers.

For each prompt, one after the other in one process: plain decoding and EESD in the same engine
(same ops, same cache), and transformers' own `generate` on the same folder, on a CPU in float32 (it
has no float32 arithmetic over bfloat16 weights). Times are the fastest of some whole calls with
prefill; a row's speeds are medians over prompts, its speed-up the median of the prompts' ratios.
Token counts come from ids.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import eesd
from bench.prompts import add_data_argument, load_prompts
from bench.results import write_results
from eesd.generation_config import GenerationConfig
from eesd_kernels import _C


def main() -> None:
    """Run and write `main_job.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sets", nargs="+", default=["gsm8k_test"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="fastest of so many runs each")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model = eesd.load(args.model, device=args.device)
    theirs = None if args.no_transformers else _transformers(model)
    rows = []
    for name in args.sets:
        prompts = load_prompts(args.data, name, model, args.new_tokens)[: args.prompts]
        rows.append(measure(model, theirs, name, prompts, args.new_tokens, args.repeats))
        print(rows[-1], flush=True)
    on = "cpu" if args.device == "cpu" else None
    print(write_results("main_job", rows, out=args.out, on=on))


def _transformers(model: eesd.Model):
    from transformers import AutoModelForCausalLM

    device = model.backbone.device
    dtype = torch.float32 if device.type == "cpu" else model.backbone.dtype
    return AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(device).eval()


def _fastest(run, repeats: int):
    best, value = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        value = run()
        best = min(best, time.perf_counter() - start)
    return best, value


def measure(
    model: eesd.Model, theirs, name: str, prompts: list[Tensor], new_tokens: int, repeats: int
) -> dict[str, object]:
    """One row: a set of prompts, greedy, linear drafts, the default rule, batch 1."""
    config = GenerationConfig(max_new_tokens=new_tokens)
    plain_speed, eesd_speed, theirs_speed, speedup, x_theirs = [], [], [], [], []
    equal, rounds, accepted = True, 0, 0
    for number, ids in enumerate([prompts[0], *prompts]):  # the first warms up
        ids = ids.to(model.backbone.device)

        def plain(ids=ids):
            return eesd.generate(model, ids[None], generation_config=config, num_assistant_tokens=0)

        def speculative(ids=ids):
            return eesd.generate(
                model, ids[None], generation_config=config, return_dict_in_generate=True
            )

        plain_s, plain_ids = _fastest(plain, repeats)
        eesd_s, out = _fastest(speculative, repeats)
        tokens = plain_ids.shape[1] - len(ids)
        equal &= torch.equal(plain_ids, out.sequences)
        if theirs is not None:
            with torch.inference_mode():
                theirs_s, their_ids = _fastest(
                    lambda ids=ids: theirs.generate(
                        ids[None],
                        attention_mask=torch.ones_like(ids)[None],
                        max_new_tokens=new_tokens,
                        do_sample=False,
                    ),
                    repeats,
                )
        if number == 0:
            continue
        plain_speed.append(tokens / plain_s)
        eesd_speed.append((out.sequences.shape[1] - len(ids)) / eesd_s)
        speedup.append(plain_s / eesd_s)
        rounds += out.speculative.num_spec_steps
        accepted += out.speculative.num_accepted_draft_tokens
        if theirs is not None:
            theirs_speed.append((their_ids.shape[1] - len(ids)) / theirs_s)
            x_theirs.append(plain_speed[-1] / theirs_speed[-1])
    head = model.exit_head
    row = {
        "dataset": name,
        "mode": "greedy",
        "schedule": "default",
        "draft": "linear",
        "B": 1,
        "N": head.config.exit_layer if head else None,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "weights": str(model.backbone.embedding.dtype).removeprefix("torch."),
        "threads": _C.get_num_threads() if model.backbone.device.type == "cpu" else None,
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "tokens_per_s": round(statistics.median(eesd_speed), 1),
        "plain_tokens_per_s": round(statistics.median(plain_speed), 1),
        "speedup": round(statistics.median(speedup), 3),
        "mean_acceptance_length": round(1 + accepted / rounds, 3),
        "ids_equal": equal,
    }
    if theirs is not None:
        row["transformers_tokens_per_s"] = round(statistics.median(theirs_speed), 1)
        row["plain_over_transformers"] = round(statistics.median(x_theirs), 2)
    return row


if __name__ == "__main__":
    main()
