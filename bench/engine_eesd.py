"""EESD against plain decoding in the same engine, on synthetic models of several agreements.

Greedy, batch 1, bfloat16. `speedup` is over plain decoding in the same run; `efficiency` is the
tokens a second over what the same rounds would give if each took only the time to read its bytes.
`--transformers` measures the same weights there: plain, and `assistant_early_exit`.
"""

import argparse

import torch
from torch import Tensor

import eesd
from bench.engine import (
    Budget,
    Clock,
    Floor,
    bandwidth,
    engine_arguments,
    prepare,
    random_prompts,
    syncs_per_round,
    synthetic,
)
from bench.harness import print_table
from bench.results import write_results

KEY = ("shape", "schedule", "agreement_asked", "B", "N", "S")
THEIR_TOKENS = 128  # of transformers, which takes 60 to 90 ms each


def main() -> None:
    """Measure and write `engine_eesd.json`."""
    parser = engine_arguments(__doc__.splitlines()[0], "llama-2-13b")
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--agreements", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--schedules", nargs="+", default=["thompson", "constant"])
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--constant", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    prepare(args)
    reads, rows = bandwidth(args.device), list[dict[str, object]]()
    budget = Budget(args.seconds, len(args.agreements))
    for agreement in args.agreements:
        if budget.spent():
            break
        _agreement(agreement, args, reads, rows)
        budget.case_done()


@torch.inference_mode()
def _agreement(
    agreement: float, args: argparse.Namespace, reads: float, rows: list[dict[str, object]]
) -> None:
    model = synthetic(args, agreement, args.exit_layer)
    prompts = [p[None] for p in random_prompts(model, [args.context] * args.prompts, 0)]
    plain = [_decode(model, p, args.new_tokens, num_assistant_tokens=0) for p in prompts]
    for schedule in args.schedules:
        rows.append(_row(model, prompts, plain, schedule, agreement, args, reads))
        print_table(rows[-1:])
        write_results("engine_eesd", rows, out=args.out, key=KEY)
    if args.transformers:
        model.captures.clear()
        rows.append(_transformers_row(model, prompts[0], plain[0], agreement, args))
        print_table(rows[-1:])
        write_results("engine_eesd", rows, out=args.out, key=KEY)


def _decode(
    model: eesd.Model, ids: Tensor, new_tokens: int, **options: object
) -> tuple[eesd.GenerateOutput, float]:
    """Its output and tokens a second, prefill left out; the graphs are captured before."""
    for tokens in (8, new_tokens):
        clock = Clock()
        out = eesd.generate(
            model, ids, max_new_tokens=tokens, eos_token_id=(), streamer=clock,
            return_dict_in_generate=True, seed=0, **options,
        )  # fmt: skip
    return out, clock.tokens_per_s()


def _row(
    model: eesd.Model,
    prompts: list[Tensor],
    plain: list[tuple[eesd.GenerateOutput, float]],
    schedule: str,
    agreement: float,
    args: argparse.Namespace,
    reads: float,
) -> dict[str, object]:
    drafts = args.constant if schedule == "constant" else args.drafts
    options = {"num_assistant_tokens": drafts, "num_assistant_tokens_schedule": schedule}
    runs = [_decode(model, ids, args.new_tokens, **options) for ids in prompts]
    head = model.exit_head
    floor, needed, emitted, rounds, lengths = Floor.of(model, head), 0.0, 0, 0, list[int]()
    for out, _ in runs:
        stats = out.speculative
        at = args.context
        steps = zip(stats.per_step_drafted[0], stats.per_step_accepted[0], strict=True)
        for drafted, accepted in steps:
            needed += floor.round(drafted, at) / reads * 1e-6
            at += accepted + 1
            lengths.append(drafted)
        emitted, rounds = emitted + at - args.context, rounds + stats.num_spec_steps
    speed = len(runs) / sum(1 / s for _, s in runs)
    base = len(plain) / sum(1 / s for _, s in plain)
    accepted = sum(out.speculative.num_accepted_draft_tokens for out, _ in runs)
    drafted = sum(out.speculative.num_draft_tokens for out, _ in runs)
    same = [
        torch.equal(a.sequences, b.sequences) for (a, _), (b, _) in zip(runs, plain, strict=True)
    ]

    def short(tokens: int) -> eesd.GenerateOutput:
        return eesd.generate(
            model, prompts[0], max_new_tokens=tokens, eos_token_id=(), seed=0,
            return_dict_in_generate=True, **options,
        )  # fmt: skip

    costs, engine = runs[0][0].speculative.costs, runs[0][0].speculative.engine
    return {
        "shape": args.shape,
        "weights": "synthetic",
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "mode": "greedy",
        "schedule": "default" if schedule == "thompson" else schedule,
        "draft": "linear",
        "B": 1,
        "N": args.exit_layer,
        "K": drafts,
        "S": args.context,
        "prompts": len(prompts),
        "new_tokens": args.new_tokens,
        "agreement_asked": agreement,
        "agreement_measured": head.config.recipe["measured_agreement"],
        "draft_acceptance_rate": round(accepted / max(drafted, 1), 4),
        "mean_draft_length": round(sum(lengths) / len(lengths), 3),
        "mean_acceptance_length": round(1 + accepted / rounds, 3),
        "tokens_per_s": round(speed, 2),
        "plain_tokens_per_s": round(base, 2),
        "speedup": round(speed / base, 3),
        "efficiency": round(speed * needed / emitted, 4),
        "read_gb_s": round(reads * 1e-3, 1),
        "ids_equal": all(same),
        "syncs_per_round": round(syncs_per_round(short, 16, 64), 3),
        "captured": engine.captured,
        "round_ms": [] if costs is None else [round(ms, 4) for ms in costs.rest],
    }


def _transformers_row(
    model: eesd.Model,
    ids: Tensor,
    plain: tuple[eesd.GenerateOutput, float],
    agreement: float,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Plain decoding and `assistant_early_exit` of transformers on the very same tensors, prefill
    left out as in ours."""
    theirs = as_transformers(model)
    speeds, texts = [], []
    for options in ({}, {"assistant_early_exit": args.exit_layer}):
        for tokens in (8, THEIR_TOKENS):  # the first warms up
            clock = Clock()
            text = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=clock,
                do_sample=False, eos_token_id=None, pad_token_id=0, **options,
            )  # fmt: skip
        speeds.append(clock.tokens_per_s())
        texts.append(text)
    return {
        "shape": args.shape,
        "weights": "synthetic",
        "dtype": "bfloat16",
        "mode": "greedy",
        "schedule": "transformers",
        "B": 1,
        "N": args.exit_layer,
        "S": args.context,
        "prompts": 1,
        "new_tokens": THEIR_TOKENS,
        "agreement_asked": agreement,
        "tokens_per_s": round(speeds[1], 2),
        "plain_tokens_per_s": round(speeds[0], 2),
        "speedup": round(speeds[1] / speeds[0], 3),
        "ids_equal": torch.equal(*texts),
        "x_transformers": round(speeds[0] / plain[1], 4),
    }


def as_transformers(model: eesd.Model) -> object:
    """A LlamaForCausalLM over the model's own tensors: views, no second copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, backbone = model.config, model.backbone
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.max_position,
                rms_norm_eps=config.rms_eps,
                rope_theta=config.rope.theta,
                tie_word_embeddings=config.tied_head,
            )
        )
    state = {"model.embed_tokens.weight": backbone.embedding, "model.norm.weight": backbone.norm}
    state["lm_head.weight"] = backbone.lm_head
    for i, layer in enumerate(backbone.layers):
        state |= layer.named(f"model.layers.{i}.", config)
    theirs.load_state_dict(state, strict=True, assign=True)
    rotary = type(theirs.model.rotary_emb)(theirs.config)  # its buffers are no part of the state
    theirs.model.rotary_emb = rotary.to(backbone.device)
    return theirs.eval()


if __name__ == "__main__":
    main()
