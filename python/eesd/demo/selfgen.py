"""On-policy text: the trained backbone continues prompts cut from its own training corpus.

Exit layers are distilled on what the backbone will really write, so half of the rows are greedy
and half sampled at temperature 1. A batch's prompts share one length: nothing is padded. After an
`<|endoftext|>` the row goes on with a new document; greedy rows sample its first tokens, for else
they would all open the same one.

Writes FILE (uint16 rows of prompt + continuation, all of one length) and FILE with the suffix
.json beside it (row length, prompt lengths, which rows are greedy). `--seconds` is a hard limit: a
batch that it cuts short is dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

PROMPT_LENGTHS = (32, 64, 96, 128)
OPENING_TOKENS = 16  # sampled after an end of text, also in greedy rows
DOCUMENT_START_SHARE = 0.6


class Prompts:
    """Cuts prompts from a corpus folder's training stream."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "sources.json").is_file():
            raise FileNotFoundError(f"no corpus in {folder}: run eesd.demo.corpus first")
        sources = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
        self.eos = sources["eos"]
        self.tokens = np.fromfile(folder / "tokens_train.bin", np.uint16)
        starts = np.flatnonzero(self.tokens == sources["bos"])
        self.segments = [(a, b) for a, b in sources["train"].values() if b > a]
        self.starts = [starts[(starts >= a) & (starts < b - 1)] for a, b in self.segments]
        # By the root of its size: the small sources are heard, the large ones still lead.
        weight = np.sqrt([b - a for a, b in self.segments])
        self.weight = weight / weight.sum()

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """Prompts uint16 [rows, length]: document starts (with their bos) and inner windows."""
        last = len(self.tokens) - length
        if last < 0:
            raise ValueError(f"corpus of {len(self.tokens)} tokens has no window of {length}")
        offsets = np.empty(rows, np.int64)
        for row, source in enumerate(rng.choice(len(self.segments), rows, p=self.weight)):
            if rng.random() < DOCUMENT_START_SHARE:
                offsets[row] = rng.choice(self.starts[source])
            else:
                offsets[row] = rng.integers(*self.segments[source])
        return self.tokens[np.minimum(offsets, last)[:, None] + np.arange(length)]


@torch.inference_mode()
def continue_rows(
    model: torch.nn.Module,
    prompts: Tensor,
    *,
    length: int,
    greedy_rows: int,
    eos: int,
    generator: torch.Generator,
    deadline: float,
) -> Tensor | None:
    """Continues prompts int64 [B, P] to [B, length]; None if the deadline comes first.

    Args:
        greedy_rows: the first so many rows take the best token, the others sample.
        deadline: in `time.monotonic()` seconds.
    """
    batch, start = prompts.shape
    rows = torch.empty(batch, length, dtype=torch.int64, device=prompts.device)
    rows[:, :start] = prompts
    sampled = torch.arange(batch, device=prompts.device) >= greedy_rows
    since_end = torch.full((batch,), OPENING_TOKENS, device=prompts.device)
    past, fed = None, prompts
    for position in range(start, length):
        out = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        # Gumbel's argmax: exact sampling at temperature 1, and plain argmax where the noise is off.
        noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-20).log_()
        noisy = sampled | (since_end < OPENING_TOKENS)
        fed = torch.where(noisy[:, None], logits - noise, logits).argmax(-1, keepdim=True)
        rows[:, position] = fed[:, 0]
        since_end = torch.where(fed[:, 0] == eos, 0, since_end + 1)
        if position % 16 == 0:
            if prompts.is_cuda:
                torch.cuda.current_stream().synchronize()
            if time.monotonic() > deadline:
                return None
    return rows


def generate(
    model: torch.nn.Module,
    prompts: Prompts,
    out: Path,
    *,
    tokens: int,
    seconds: float,
    batch: int,
    length: int,
    seed: int,
    began: float,
) -> dict:
    """Fills `out` with at least `tokens` tokens or what `seconds` allow; returns its record."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    record: dict = {"row_length": length, "dtype": "uint16", "eos": prompts.eos, "seed": seed}
    batches: list[dict] = []
    usable = [n for n in PROMPT_LENGTHS if n < length] or [length // 2]
    rows_done, slowest = 0, 0.0
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        while rows_done * length < tokens:
            batch_began = time.monotonic()
            if batch_began + slowest > began + seconds:
                break
            cut = usable[len(batches) % len(usable)]
            drawn = torch.from_numpy(prompts.draw(rng, batch, cut).astype(np.int64)).to(device)
            rows = continue_rows(
                model,
                drawn,
                length=length,
                greedy_rows=batch // 2,
                eos=prompts.eos,
                generator=generator,
                deadline=began + seconds,
            )
            if rows is None:
                break
            file.write(rows.cpu().numpy().astype(np.uint16).tobytes())
            batches.append({"rows": batch, "prompt_length": cut, "greedy_rows": batch // 2})
            rows_done += batch
            taken = time.monotonic() - batch_began
            slowest = max(slowest, taken)
            rate = batch * (length - cut) / taken
            print(f"{rows_done * length:,} tokens, {rate / 1e3:.0f} ktok/s", flush=True)
    if not rows_done:
        partial.unlink()
        raise TimeoutError(f"{seconds} s were too few for one batch of {batch} rows of {length}")
    record |= {"rows": rows_done, "tokens": rows_done * length, "batches": batches}
    record["seconds"] = round(time.monotonic() - began, 1)
    os.replace(partial, out)
    text = json.dumps(record, indent=2) + "\n"
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    return record


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m eesd.demo.selfgen --model DIR --corpus DIR --out FILE`."""
    began = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", type=Path, required=True, help="folder that eesd.demo.train wrote")
    p.add_argument("--corpus", type=Path, required=True, help="folder that eesd.demo.corpus wrote")
    p.add_argument("--out", type=Path, required=True, help="file of tokens, e.g. tokens_self.bin")
    p.add_argument("--tokens", type=int, default=4_000_000, help="stop at so many")
    p.add_argument("--seconds", type=float, default=60.0, help="hard limit, start included")
    p.add_argument("--batch", type=int, default=2048)
    p.add_argument("--row-length", type=int, default=320, help="prompt and continuation")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    for folder in (args.model, args.corpus):
        if not folder.is_dir():
            print(f"error: folder not found: {folder}", file=sys.stderr)
            return 2
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model).to(args.device, dtype).eval()
    limit = model.config.max_position_embeddings
    if not 2 <= args.row_length <= limit:
        print(f"error: --row-length must be 2 to {limit}, got {args.row_length}", file=sys.stderr)
        return 2
    record = generate(
        model,
        Prompts(args.corpus),
        args.out,
        tokens=args.tokens,
        seconds=args.seconds,
        batch=args.batch,
        length=args.row_length,
        seed=args.seed,
        began=began,
    )
    print(f"wrote {record['tokens']:,} tokens to {args.out} in {record['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
