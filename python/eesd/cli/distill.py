"""`eesd distill`: train an exit head for a model."""

import argparse
import dataclasses
import time
from pathlib import Path

from eesd.distill.settings import (
    DEFAULT_SEQ_LEN,
    DEFAULT_STEPS,
    LOSSES,
    LR_TIMES_HIDDEN,
    DistillSettings,
)

EXAMPLE = """
The model's own predictions are the target, so the text needs no labels; text like that which the
model will be asked to write serves best, its own output better still. Every fiftieth document is
held out to measure the head. A run that was killed goes on, when called again, where it was at most
a minute before; one that was stopped with Ctrl-C, where it was stopped.

data files:
  .txt     UTF-8 text, one document a file
  .jsonl   an object a line: its "text", or "question" and "answer", or "prompt" and "completion"
  .bin     uint16 token ids of the model's tokenizer

example:
  eesd distill --model ./llama --exit-layer 2 --data chat.jsonl --out ./llama/exit_head
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; their defaults are DistillSettings'."""
    parser.epilog = EXAMPLE
    default = DistillSettings()
    run = parser.add_argument_group("what to train")
    run.add_argument("--model", required=True, help="Hugging Face folder of the model, or demo")
    run.add_argument(
        "--exit-layer", type=int, required=True, metavar="N",
        help="draft with the first N layers, 1 to layers - 1",
    )  # fmt: skip
    run.add_argument(
        "--data", required=True, nargs="+", type=Path, metavar="FILE",
        help="text to train on: .txt, .jsonl or .bin files",
    )  # fmt: skip
    run.add_argument(
        "--out", required=True, type=Path,
        help="folder to write; a model finds the head in its subfolder exit_head by itself",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="replace the exit head in --out")
    run.add_argument(
        "--restart", action="store_true", help="discard an interrupted run instead of going on"
    )

    budget = parser.add_argument_group("how long (the first to be reached ends the run)")
    budget.add_argument(
        "--steps", type=int,
        help=f"training steps (default: {DEFAULT_STEPS} where --seconds is not given)",
    )  # fmt: skip
    budget.add_argument(
        "--seconds", type=float,
        help="wall-clock budget in seconds, loading and evaluation included (default: none)",
    )  # fmt: skip

    train = parser.add_argument_group("training")
    train.add_argument(
        "--loss", choices=LOSSES, default=default.loss,
        help="kl: forward KL divergence; tv: total variation, 1 - the chance of acceptance when "
        f"sampling; mixed: their mean (default: {default.loss})",
    )  # fmt: skip
    train.add_argument(
        "--temperature", type=float, default=default.temperature,
        help=f"of both distributions in the loss (default: {default.temperature:g})",
    )  # fmt: skip
    train.add_argument(
        "--batch", type=int, default=default.batch,
        help=f"sequences a step (default: {default.batch})",
    )  # fmt: skip
    train.add_argument(
        "--micro-batch", type=int,
        help="sequences at a time, a divisor of --batch; less needs less memory (default: all)",
    )  # fmt: skip
    train.add_argument(
        "--seq-len", type=int,
        help=f"tokens a sequence (default: {DEFAULT_SEQ_LEN}, or the model's longest if less)",
    )  # fmt: skip
    train.add_argument(
        "--lr", type=float, help=f"peak learning rate (default: {LR_TIMES_HIDDEN:g} / hidden size)"
    )
    train.add_argument(
        "--warmup", type=int, default=default.warmup,
        help=f"steps until the peak, a tenth of --steps at most (default: {default.warmup})",
    )  # fmt: skip
    train.add_argument(
        "--clip", type=float, default=default.clip,
        help=f"largest gradient norm (default: {default.clip:g})",
    )  # fmt: skip
    train.add_argument(
        "--weight-decay", type=float, default=default.weight_decay,
        help=f"of AdamW, on matrices (default: {default.weight_decay:g})",
    )  # fmt: skip
    train.add_argument(
        "--own-lm-head", action="store_true",
        help="train a copy of the LM head too (default: share the model's own)",
    )  # fmt: skip
    train.add_argument(
        "--eval-sequences", type=int, default=default.eval_sequences,
        help=f"most held-out sequences of an evaluation (default: {default.eval_sequences})",
    )  # fmt: skip
    train.add_argument(
        "--seed", type=int, default=default.seed,
        help=f"of the order of the text (default: {default.seed})",
    )  # fmt: skip

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    machine.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="of the arithmetic (default: bfloat16 on cuda, float32 on cpu)",
    )  # fmt: skip
    machine.add_argument(
        "--compile", action="store_true", help="use torch.compile: slower to start, then faster"
    )
    machine.add_argument(
        "--checkpoint-steps", type=int, default=500,
        help="steps between two checkpoints in OUT.partial; one is written every minute besides "
        "(default: 500)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, and print what was measured."""
    began = time.monotonic()
    names = [field.name for field in dataclasses.fields(DistillSettings)]
    settings = DistillSettings(**{name: getattr(args, name) for name in names})

    from eesd.distill.run import distill

    result = distill(
        args.model,
        args.exit_layer,
        args.data,
        args.out,
        settings=settings,
        device=args.device,
        dtype=args.dtype,
        overwrite=args.overwrite,
        restart=args.restart,
        compile=args.compile,
        checkpoint_steps=args.checkpoint_steps,
        began=began,
    )
    print(
        f"{result.out}: exit layer {args.exit_layer}, {result.steps} steps, "
        f"{result.tokens:,} tokens, {result.seconds:.1f} s\n"
        f"agreement {result.agreement:.3f} (before training {result.agreement_before:.3f}, "
        f"one token always {result.most_frequent:.3f}), acceptance when sampling "
        f"{result.sampled_acceptance:.3f}\n"
        f"mean acceptance length {result.mean_acceptance_length:.2f} with drafts of 5, "
        f"prior Beta({result.prior_alpha:g}, {result.prior_beta:g})"
    )
    return 0
