"""The state of an unfinished run, in `<out>.partial/` beside the head's folder."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from eesd.config import EXIT_HEAD_TYPE

ADVICE = "give the same arguments to go on, or restart to begin again"


class Checkpoint:
    """One file, replaced whole. `identity` is what must be the same for a run to go on."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self.path = self.folder / "checkpoint.pt"
        # By way of JSON, so that what is compared is what a file can hold.
        self.identity = json.loads(json.dumps(identity))

    def save(self, state: dict[str, Any]) -> None:
        """Write beside the final name, then rename: never half a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        torch.save({"identity": json.dumps(self.identity), **state}, fresh)
        os.replace(fresh, self.path)

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none.

        Raises:
            ValueError: it is of a run with other arguments, or damaged.
        """
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            before: dict[str, Any] = json.loads(state.pop("identity"))
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path}: not a readable checkpoint: {first}") from None
        changed = [
            f"{name} was {before.get(name)!r}, now {self.identity.get(name)!r}"
            for name in {**before, **self.identity}
            if before.get(name) != self.identity.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path}: an unfinished run with other arguments ({'; '.join(changed)}): "
                + ADVICE
            )
        return state

    def remove(self) -> None:
        """Delete the checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, an `out` that cannot be written or must not be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"out: {out}: expected a folder to write, this is something else")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"out: {out}: exists already; overwrite to replace it")
        if not _is_head(out):
            raise ValueError(f"out: {out}: not an exit head's folder, not replacing it")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"out: {out}: {parent} is not a folder that can be written to")


def _is_head(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == EXIT_HEAD_TYPE
