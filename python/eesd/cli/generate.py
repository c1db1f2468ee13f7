"""`eesd generate`: continue a prompt."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eesd.cli.compare import Comparison
    from eesd.generation import GenerateOutput
    from eesd.generation_config import GenerationConfig
    from eesd.loading import Model

EXAMPLES = {
    "math": "Ann has 3 baskets with 12 apples each. She sells 20 apples for $2 each. "
    "How much money does she make?\n",
    "python": "def read_lines(path, encoding=None):\n",
}
SCHEDULES = ("thompson", "cost", "calibrated", "bernoulli", "constant")
NEW_TOKENS = 256

NOTES = """
The prompt is the argument, --file, or standard input (a pipe, or `-`); it is taken as it is, its
last line break included. The text goes to standard output, notes go to standard error.

examples:
  eesd generate --compare --example math
  eesd generate --model ./llama --max-new-tokens 64 "The sea is"
  git diff | eesd generate --model ./llama --temperature 0.7 --seed 1 --json -
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; where none is given, GenerationConfig's defaults hold."""
    parser.epilog = NOTES
    parser.add_argument("prompt", nargs="?", help="text to continue; - reads standard input")
    parser.add_argument("--file", type=Path, help="read the prompt from a UTF-8 text file")
    parser.add_argument("--example", choices=tuple(EXAMPLES), help="use a built-in example prompt")

    what = parser.add_argument_group("model")
    what.add_argument(
        "--model", default="demo", help="Hugging Face folder, or demo (default: demo)"
    )
    what.add_argument(
        "--exit-head", type=Path, help="folder of an exit head (default: the model's)"
    )
    what.add_argument(
        "--early-exit", type=int, metavar="N",
        help="draft with the first N layers and the model's own head, without a trained one",
    )  # fmt: skip
    what.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    what.add_argument(
        "--dtype", help="of activations (default: float32 on cpu, the checkpoint's on cuda)"
    )
    what.add_argument("--threads", type=int, help="CPU threads (default: all)")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--max-new-tokens", type=int,
        help=f"default: {NEW_TOKENS}, or the model's remaining positions if less",
    )  # fmt: skip
    text.add_argument("--min-new-tokens", type=int, help="no end of text before (default: 0)")
    text.add_argument(
        "--stop", action="append", metavar="TEXT",
        help="end behind the token that completes this text; may be given again",
    )  # fmt: skip
    text.add_argument(
        "--repetition-penalty", type=float,
        help="above 1: tokens that stand in the text already are less likely (default: 1)",
    )  # fmt: skip
    text.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N",
        help="no N tokens in a row come twice (default: 0, off)",
    )  # fmt: skip
    text.add_argument(
        "--sample", action="store_true",
        help="sample instead of taking the best token; the options below imply it",
    )  # fmt: skip
    text.add_argument("--temperature", type=float, help="above 0 (default: 1); 0 is greedy")
    text.add_argument("--top-k", type=int, help="keep the K most likely tokens (default: all)")
    text.add_argument("--top-p", type=float, help="keep the likeliest tokens of this mass")
    text.add_argument("--min-p", type=float, help="drop tokens below this share of the likeliest")
    text.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")

    draft = parser.add_argument_group("drafting (changes the speed, never the law of the text)")
    draft.add_argument(
        "--num-assistant-tokens", type=int, metavar="K",
        help="longest draft (default: 8); 0 decodes plainly",
    )  # fmt: skip
    draft.add_argument("--schedule", choices=SCHEDULES, help="of draft lengths (default: thompson)")
    draft.add_argument(
        "--assistant-sampling", choices=("rejection", "coupled", "block"),
        help="coupled: the same sampled tokens as plain decoding's with this seed",
    )  # fmt: skip
    draft.add_argument(
        "--confidence-threshold", type=float, metavar="P",
        help="end a draft where the exit head's best token is less likely (default: 0, off)",
    )  # fmt: skip

    report = parser.add_argument_group("report")
    report.add_argument(
        "--compare", action="store_true", help="decode plainly too: speeds, and whether ids agree"
    )
    report.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each kind to compare (default: 3)"
    )
    report.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Generate and report."""
    if args.repeats < 1:
        raise ValueError(f"--repeats: expected 1 or more, got {args.repeats}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected 1 or more, got {args.threads}")
    if args.compare and args.num_assistant_tokens == 0:
        raise ValueError("--compare: --num-assistant-tokens 0 is plain decoding already")
    prompt = _prompt(args)

    import eesd
    from eesd.cli.compare import compare, run_timed, warm_up
    from eesd.cli.streaming import TextStreamer

    if args.threads is not None:
        import torch

        from eesd_kernels import _C

        torch.set_num_threads(args.threads)
        _C.set_num_threads(args.threads)
    model = eesd.load(
        args.model, args.exit_head, args.device, args.dtype, assistant_early_exit=args.early_exit
    )
    ids = model.encode(prompt)
    config = _config(args, model.config.max_position - ids.shape[1])

    warm_up(model, ids, config)
    streamer = None if args.json else TextStreamer(model.decode, sys.stdout)
    output, speed = run_timed(model, ids, config, args.seed, streamer)
    compared = (
        compare(model, ids, config, args.seed, args.repeats, output) if args.compare else None
    )
    if args.json:
        report = _report(args, model, config, ids.shape[1], output, speed, compared)
        print(json.dumps(report))
    elif compared is not None:
        print("\n" + _table(config, output, compared))
    elif sys.stdout.isatty():
        tokens = output.sequences.shape[1] - ids.shape[1]
        length = output.speculative.mean_acceptance_length
        _note(f"{tokens} tokens, {speed:.1f} a second, {length:.2f} a round")
    return 0


def _prompt(args: argparse.Namespace) -> str:
    given = [
        name
        for name, value in (
            ("an argument", args.prompt), ("--file", args.file), ("--example", args.example)
        )
        if value is not None
    ]  # fmt: skip
    if len(given) > 1:
        raise ValueError(f"prompt: given as {' and as '.join(given)}; give one")
    if args.file is not None:
        text = _utf8(args.file.read_bytes(), str(args.file))
    elif args.prompt not in (None, "-"):
        text = args.prompt
    elif args.prompt is None and (args.example or sys.stdin.isatty()):
        if args.example is None and args.model != "demo":
            raise ValueError("prompt: none given; pass it as an argument, --file or a pipe")
        text = EXAMPLES[args.example or "math"]
        _note(f"built-in example prompt: {text.strip()}")
    else:
        text = _utf8(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise ValueError("prompt: it is empty; give some text to continue")
    return str(text)


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from None


def _config(args: argparse.Namespace, room: int) -> "GenerationConfig":
    from eesd.generation_config import GenerationConfig

    options = {
        name: getattr(args, name)
        for name in ("temperature", "top_k", "top_p", "min_p")
        if getattr(args, name) is not None
    }
    options["do_sample"] = args.sample or bool(options)
    if args.temperature == 0:
        del options["temperature"]
        options["do_sample"] = False
    # A prompt that leaves no room is generate's to refuse.
    default = max(1, min(NEW_TOKENS, room))
    options["max_new_tokens"] = default if args.max_new_tokens is None else args.max_new_tokens
    for name, value in (
        ("min_new_tokens", args.min_new_tokens),
        ("stop_strings", args.stop),
        ("repetition_penalty", args.repetition_penalty),
        ("no_repeat_ngram_size", args.no_repeat_ngram_size),
        ("num_assistant_tokens", args.num_assistant_tokens),
        ("num_assistant_tokens_schedule", args.schedule),
        ("assistant_sampling", args.assistant_sampling),
        ("assistant_confidence_threshold", args.confidence_threshold),
    ):
        if value is not None:
            options[name] = value
    return GenerationConfig(**options)


def _table(config: "GenerationConfig", output: "GenerateOutput", compared: "Comparison") -> str:
    stats = output.speculative
    histogram = "  ".join(f"{n}: {count}" for n, count in enumerate(stats.acceptance_histogram))
    lines = [
        ("speculative", f"{compared.tokens_per_s:.1f} tokens/s"),
        ("plain", f"{compared.plain_tokens_per_s:.1f} tokens/s"),
        ("speed-up", f"{compared.speedup:.2f}"),
        ("ids", _verdict(config, compared)),
        ("acceptance", f"{stats.mean_acceptance_length:.2f} tokens a round"),
        (
            "drafts",
            f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} tokens accepted "
            f"({stats.draft_acceptance_rate:.1%})",
        ),
        ("accepted", f"{histogram}   (drafted tokens a round: rounds)"),
        (
            "measured",
            f"median of {compared.repeats} runs each, in turn, after a warm-up; same model, "
            "kernels and cache; prefill included",
        ),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def _verdict(config: "GenerationConfig", compared: "Comparison") -> str:
    if compared.ids_equal:
        return "equal"
    if config.do_sample and config.assistant_sampling != "coupled":
        return (
            f"differ, as they may: {config.assistant_sampling} sampling keeps the distribution, "
            "not the draws"
        )
    assert compared.difference is not None
    where = f"differ from new token {compared.difference.position} on"
    gap = compared.difference.logit_gap
    return where if gap is None else f"{where} (plain logits {gap:.3g} apart there)"


def _report(
    args: argparse.Namespace,
    model: "Model",
    config: "GenerationConfig",
    prompt_tokens: int,
    output: "GenerateOutput",
    speed: float,
    compared: "Comparison | None",
) -> dict[str, Any]:
    from eesd_kernels import _C

    stats, new = output.speculative, output.sequences[0, prompt_tokens:].tolist()
    head = model.exit_head if config.num_assistant_tokens else None
    difference = compared.difference if compared else None
    return {
        "text": model.decode(new),
        "token_ids": new,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new),
        "finish_reason": output.finish_reasons[0],
        "tokens_per_s": compared.tokens_per_s if compared else speed,
        "plain_tokens_per_s": compared.plain_tokens_per_s if compared else None,
        "speedup": compared.speedup if compared else None,
        "repeats": compared.repeats if compared else None,
        "ids_equal": compared.ids_equal if compared else None,
        "first_difference": difference.position if difference else None,
        "logit_gap": difference.logit_gap if difference else None,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "acceptance_histogram": stats.acceptance_histogram,
        "num_spec_steps": stats.num_spec_steps,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_draft_tokens": stats.num_accepted_draft_tokens,
        "mode": "sampled" if config.do_sample else "greedy",
        "seed": args.seed if config.do_sample else None,
        "schedule": config.num_assistant_tokens_schedule,
        "assistant_sampling": config.assistant_sampling,
        "num_assistant_tokens": config.num_assistant_tokens,
        "model": model.name,
        "exit_layer": head.config.exit_layer if head else None,
        "device": str(model.backbone.device),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "threads": _C.get_num_threads(),
    }


def _note(text: str) -> None:
    print(f"eesd: {text}", file=sys.stderr)
