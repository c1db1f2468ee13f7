"""Evaluation prompts from a data folder that is no part of this repository."""

import argparse
import json
import sys
from pathlib import Path

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
