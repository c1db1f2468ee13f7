"""Check every file of bench/results: `make check-results`.

A result names its machine, versions, commit and the command that makes it again, and its rows are
flat objects whose fields have the meanings of `bench.results`. A wrong file is named with what was
expected and what came.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.results import ROOT

HEAD: dict[str, tuple[type, ...]] = {
    "bench": (str,),
    "machine": (str,),
    "gpu": (str, type(None)),
    "driver": (str, type(None)),
    "torch": (str,),
    "triton": (str, type(None)),
    "commit": (str,),
    "date": (str,),
    "command": (str,),
    "rows": (list,),
}
SIZES = (
    "V", "H", "R", "B", "K", "T", "k", "O", "Hq", "Hkv", "D", "S", "N", "prompts", "bytes",
    "draws", "tokens", "degrees",
)  # fmt: skip
EQUALITIES = ("rows_equal", "bytes_equal", "ids_equal", "close")
"""All true, but for the text of a peer."""
PEERS = ("transformers",)
TEXTS = (
    "shape", "dtype", "law", "dataset", "mode", "schedule", "draft", "rule", "set", "op",
    "launches", "children",
)  # fmt: skip
POSITIVE = re.compile(r"us|us_p20|us_p80|x_\w+|tokens_per_s|speedup|mean_acceptance_length")
SHARES = ("ceiling_share", "floor_share", "efficiency")
PROBABILITIES = {"p_value": 1e-3, "p_value_of_another_law": 0.0}
"""And the least that they may be: a law is refused at or below the first."""


def problems(path: Path, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with a file, one line each."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json)
    except ValueError as error:
        yield f"not JSON: {error}"
        return
    if not isinstance(content, dict):
        yield f"expected an object, got {type(content).__name__}"
        return
    for name, types in HEAD.items():
        if name not in content:
            yield f"{name}: missing"
        elif not isinstance(content[name], types):
            yield f"{name}: expected {_names(types)}, got {content[name]!r}"
    for name, want in (("bench", path.stem), ("machine", path.parent.name)):
        if content.get(name) != want:
            yield f"{name}: expected {want!r} as in the path, got {content.get(name)!r}"
    if (content.get("machine") == "cpu") != (content.get("gpu") is None):
        yield f"gpu: expected a name, or null on cpu, got {content.get('gpu')!r}"
    for name, form in (("commit", r"[0-9a-f]{40}"), ("date", r"\d{4}-\d\d-\d\d")):
        value = content.get(name)
        if isinstance(value, str) and not re.fullmatch(form, value):
            yield f"{name}: expected {form}, got {value!r}"
    command = content.get("command")
    if isinstance(command, str):
        module = re.match(r"python -m (bench\.\w+)", command)
        if not module or find_spec(module[1]) is None:
            yield f"command: expected python -m bench.<one that exists>, got {command!r}"
        if re.search(r"(^|[\s=])/", command):
            yield f"command: expected no path of a machine, got {command!r}"
    rows = content.get("rows")
    if rows == []:
        yield "rows: expected at least one"
    for at, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, dict):
            yield from (f"rows[{at}]: {text}" for text in _row_problems(row))
        else:
            yield f"rows[{at}]: expected an object, got {row!r}"


def _row_problems(row: dict[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, (str, int, float, bool, list)):
            yield f"{name}: expected a value or a list, got {value!r}"
        elif name in SIZES and (not number or value != int(value) or value < 0):
            yield f"{name}: expected a size, got {value!r}"
        elif name in EQUALITIES and value is not True:
            if value is not False or row.get("schedule") not in PEERS:
                yield f"{name}: expected true, got {value!r}"
        elif name in TEXTS and not isinstance(value, str):
            yield f"{name}: expected text, got {value!r}"
        elif POSITIVE.fullmatch(name) and not (number and value > 0):
            yield f"{name}: expected a number above 0, got {value!r}"
        elif name in SHARES and not (number and 0 < value < 1.2):
            yield f"{name}: expected a share, got {value!r}"
        elif name in PROBABILITIES and not (number and PROBABILITIES[name] <= value <= 1):
            yield f"{name}: expected {PROBABILITIES[name]} to 1, got {value!r}"
        elif number and not math.isfinite(value):
            yield f"{name}: expected a finite number, got {value!r}"
    if "us" in row and not row.get("us_p20", 0) <= row["us"] <= row.get("us_p80", math.inf):
        yield f"us: expected us_p20 <= us <= us_p80, got {row}"


def _names(types: tuple[type, ...]) -> str:
    return " or ".join("null" if t is type(None) else t.__name__ for t in types)


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is no number")


def main() -> int:
    paths = sorted(ROOT.rglob("*.json"))
    found = [f"{path.relative_to(ROOT)}: {text}" for path in paths for text in problems(path)]
    print("\n".join(found) if found else f"{len(paths)} result files are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
