"""Evaluation prompts from a data folder that is no part of this repository, also as batches."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from eesd import Model

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """`--data`: where the prompt files lie."""
    parser.add_argument(
        "--data", type=Path, default=DEFAULT, help="folder of <set>.jsonl files with prompts"
    )


def load_prompts(folder: Path, name: str, model: Model, new_tokens: int) -> list[Tensor]:
    """Token ids `[P]` of a set's prompts that leave room for the new tokens, in file order."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        sys.exit(f"{path}: no such file; give the folder of prompts with --data")
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [model.encode(json.loads(line)["prompt"])[0] for line in lines if line]
    room = model.config.max_position - new_tokens
    return [ids for ids in prompts if len(ids) <= room]


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts `[P_b]` as one batch `[B, P]` and its mask."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts])
    return ids, mask.long()
