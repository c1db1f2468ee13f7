"""Record what an exit head would have drafted along the model's own text, for `controller_replay`.

Plain decoding writes the text (greedy, then sampled at temperature 1); one pass over it then
gives, for every generated position, `rank` (uint8, how many exit candidates score above the token
that was emitted: 0 is an accepted greedy draft) and `top1` (float16, the exit's largest
probability). Arrays `[prompts, tokens]` under `<set>|N<exit layer>|T<temperature>|<field>`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import eesd
from bench.prompts import add_data_argument, load_prompts
from eesd.exit_head import ExitHead
from eesd.layer import INFERENCE
from eesd.models import Llama

TRACES = Path(__file__).resolve().parent / "traces" / "demo.npz"
SETS = ["gsm8k_test", "humaneval", "mbpp", "spec_bench", "self_instruct_user"]


def main() -> None:
    """Run and write one compressed file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=TRACES)
    args = parser.parse_args()

    model = eesd.load(args.model, device="cpu")
    head = model.exit_head
    if head is None:
        raise SystemExit(f"{args.model}: has no exit head")
    arrays: dict[str, np.ndarray] = {}
    for name in args.sets:
        prompts = load_prompts(args.data, name, model, args.new_tokens)[: args.prompts]
        for temperature in (0, 1):
            fields = [
                trace(model, head, ids, args.new_tokens, temperature, seed)
                for seed, ids in enumerate(prompts)
            ]
            key = f"{name}|N{head.config.exit_layer}|T{temperature}"
            arrays[f"{key}|rank"] = np.stack([rank for rank, _ in fields])
            arrays[f"{key}|top1"] = np.stack([top1 for _, top1 in fields])
            agreement = (arrays[f"{key}|rank"] == 0).mean()
            print(f"{key}: {len(prompts)} prompts, agreement {agreement:.3f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


def trace(
    model: eesd.Model, head: ExitHead, prompt: Tensor, new_tokens: int, temperature: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """rank uint8 and top1 float16, `[new_tokens]` each."""
    text = eesd.generate(
        model,
        prompt[None],
        max_new_tokens=new_tokens,
        eos_token_id=(),  # all traces have one length; the model simply goes on
        do_sample=temperature > 0,
        temperature=float(temperature or 1),
        num_assistant_tokens=0,
        seed=seed,
    )[0]
    logits = exit_logits(model.backbone, head, text)[len(prompt) - 1 : -1]
    emitted = text[len(prompt) :]
    rank = (logits > logits.gather(1, emitted[:, None])).sum(1).clamp(max=255)
    top1 = logits.softmax(-1).amax(-1)
    return rank.numpy().astype(np.uint8), top1.numpy().astype(np.float16)


@torch.inference_mode()
def exit_logits(backbone: Llama, head: ExitHead, text: Tensor) -> Tensor:
    """Exit logits `[n, V]` along a text `[n]`."""
    hidden = backbone.embed(text[None])
    for layer in backbone.layers[: head.config.exit_layer]:
        hidden = backbone.causal_layer(layer, hidden, INFERENCE)
    if head.layer is not None:
        hidden = backbone.causal_layer(head.layer, hidden, INFERENCE)
    hidden = INFERENCE.rms_norm(hidden, head.norm, backbone.config.rms_eps)
    return INFERENCE.linear(hidden, head.lm_head, None)[0]


if __name__ == "__main__":
    main()
