"""Results as files: `bench/results/<machine>/<bench>.json`, all of one form."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """The folder of this machine's results: h200, another GPU's name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")


def write_results(
    bench: str,
    rows: list[dict[str, Any]],
    *,
    out: Path | None = None,
    on: str | None = None,
    key: Sequence[str] = (),
) -> Path:
    """Write a result file with what is needed to make it again.

    Args:
        bench: its name, also the file's.
        rows: one object a measurement; field names as in the other files.
        out: folder instead of bench/results.
        on: machine folder; `machine()` unless given (a CPU bench on a GPU machine says cpu).
        key: fields that name a measurement. Rows of others that the file has already stay, so
            that a long bench can be run in slices; the head is the last slice's, and each row has
            the commit that it was measured on.
    """
    where = on or machine()
    path = (out or ROOT) / where / f"{bench}.json"
    gpu = where != "cpu"
    content = {
        "bench": bench,
        "machine": where,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _run("git", "rev-parse", "HEAD"),
        "date": date.today().isoformat(),
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *_arguments()]),
        "rows": rows,
    }
    if key:
        ours = {_name(row, key) for row in rows}
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        kept = [row for row in before if _name(row, key) not in ours]
        content["rows"] = kept + [{**row, "commit": content["commit"]} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _name(row: dict[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in key)


def _arguments() -> list[str]:
    """The command line without this machine's folders."""
    return ["FOLDER" if Path(word).is_absolute() else word for word in sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        from importlib.metadata import version

        return version(package)
    except ImportError:
        return None


def _cpu_name() -> str:
    return _proc_model() or platform.processor() or platform.machine()


def _proc_model() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    for line in info.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
