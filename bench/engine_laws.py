"""The law of the whole engine's sampled texts: chi-square against the model's own exact law.

Synthetic models of narrow vocabularies, whose exits agree with them on part of the text; texts of
a few tokens behind a prompt of one, which needs no prefill, a seed each, many in a call. The exact
law comes from the logits behind every prefix, by float64 softmax. `p_value_of_another_law` is the
same counts' against the law at a temperature 1.03 times as high: what the test would see. Coupled
texts are to be plain decoding's too, seed by seed (`ids_equal`). Costs are given, so that a run can
be repeated: with the rejection laws draft lengths decide which noise is used. Exits with 1 where a
p-value is at most 1e-3, or a coupled text is another.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eesd
from bench.engine import TINY, prepare
from bench.exact_texts import joint_law, prefix_logits
from bench.harness import print_table
from bench.joint_tables import chi_square
from bench.results import write_results

LEAST, ANOTHER = 1e-3, 1.03
TOKENS = {5: 4, 17: 3}
"""Length of a text by vocabulary: 625 and 4,913 cells. The longest draft is one shorter."""
PROMPT, EXIT_LAYER, AGREEMENT = 1, 2, 0.6
TEMPERATURE = 3.0
"""Of logits with a standard deviation of 6: most texts then come, and two drafts of three stand."""
LAWS = ("rejection", "block", "coupled")
Row = dict[str, Any]


def main() -> None:
    """Count, print a table, write `engine_laws.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--schedules", nargs="+", default=["constant", "thompson", "bernoulli"])
    parser.add_argument(
        "--draws", type=int, default=100_000, help="texts a row, or up to --batch more"
    )
    parser.add_argument("--batch", type=int, default=1024, help="texts a call")
    parser.add_argument("--out", type=Path, help="folder instead of bench/results")
    args = parser.parse_args()
    prepare(args)
    rows: list[Row] = []
    for vocab in args.vocabularies:
        rows += _rows(vocab, args)
    print_table(rows)
    on = "cpu" if args.device == "cpu" else None
    print(write_results("engine_laws", rows, out=args.out, on=on))
    wrong = [r for r in rows if r["p_value"] <= LEAST or r["ids_equal"] is False]
    if wrong:
        raise SystemExit(f"{len(wrong)} rows do not have their law")


def _rows(vocab: int, args: argparse.Namespace) -> list[Row]:
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    model = eesd.synthetic(
        {**TINY, "vocab_size": vocab, "max_position_embeddings": 64},
        agreement=AGREEMENT, exit_layer=EXIT_LAYER, device=args.device, dtype=dtype,
    )  # fmt: skip
    logits = prefix_logits(model, PROMPT, TOKENS[vocab])[1].double()
    laws = [joint_law((logits / (TEMPERATURE * t)).softmax(-1)) for t in (1, ANOTHER)]
    shape = {"V": vocab, "dtype": dtype, "weights": "synthetic", "mode": "sampled"}
    plain, row = _texts(model, vocab, args, num_assistant_tokens=0)
    rows = [{**shape, "law": "plain", "schedule": None, **row, **_fits(plain, laws)}]
    for schedule in args.schedules:
        for law in LAWS:
            texts, row = _texts(
                model, vocab, args, num_assistant_tokens=TOKENS[vocab] - 1,
                num_assistant_tokens_schedule=schedule, assistant_sampling=law,
            )  # fmt: skip
            equal = torch.equal(texts, plain) if law == "coupled" else None
            name = "default" if schedule == "thompson" else schedule
            rows.append(
                {**shape, "law": law, "schedule": name, **row, **_fits(texts, laws)}
                | {"ids_equal": equal}
            )
    return rows


def _texts(
    model: eesd.Model, vocab: int, args: argparse.Namespace, **options: Any
) -> tuple[Tensor, Row]:
    """Texts `[draws, tokens]` of the seeds 0 on, and what drafts did."""
    tokens, parts = TOKENS[vocab], list[Tensor]()
    costs = {"prefix": 0.2, "exit": 0.1, "rest": [0.8] * tokens}  # not always the longest draft
    prompt = torch.tensor([[PROMPT]], device=args.device)
    drafted = accepted = rounds = 0
    start = time.perf_counter()
    for first in range(0, args.draws, args.batch):
        out = eesd.generate(
            model, prompt, num_return_sequences=args.batch, do_sample=True, eos_token_id=(),
            seed=list(range(first, first + args.batch)), temperature=TEMPERATURE,
            max_new_tokens=tokens, assistant_costs=costs, return_dict_in_generate=True, **options,
        )  # fmt: skip
        assert isinstance(out, eesd.GenerateOutput)
        stats = out.speculative
        parts.append(out.sequences[:, 1:].cpu())
        drafted, rounds = drafted + stats.num_draft_tokens, rounds + stats.num_spec_steps
        accepted += stats.num_accepted_draft_tokens
    took, texts = time.perf_counter() - start, torch.cat(parts)
    assert stats.engine is not None
    return texts, {
        "N": EXIT_LAYER,
        "K": options["num_assistant_tokens"],
        "B": args.batch,
        "temperature": TEMPERATURE,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "mean_draft_length": drafted / rounds,
        "mean_acceptance_length": 1 + accepted / rounds,
        "captured": stats.engine.captured,
        "draws_per_s": round(len(texts) / took),
        "draws": len(texts),
        "tokens": tokens,
        "ids_equal": None,
    }


def _fits(texts: Tensor, laws: list[Tensor]) -> Row:
    vocab, length = laws[0].shape[0], texts.shape[1]
    cells = (texts * vocab ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=vocab**length)
    fit, another = (chi_square(counts, law) for law in laws)
    return {
        "degrees": fit.degrees,
        "p_value": fit.p_value,
        "p_value_of_another_law": another.p_value,
    }


if __name__ == "__main__":
    main()
