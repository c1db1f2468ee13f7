"""Safetensors folders: named tensors, their errors, and a fingerprint of a set of weights."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eesd.fields import read_json

_SAMPLES, _SAMPLE_BYTES = 64, 64


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None


class WeightFolder:
    """The tensors of `model.safetensors`, or of the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index}: expected a weight_map of tensor names to files")
            names = sorted(set(map(str, shards.values())))
            self.files = [folder / name for name in names]
        else:
            self.files = [folder / "model.safetensors"]
        self._where: dict[str, Path] = {}
        for path in self.files:
            if not path.exists():
                raise ValueError(f"{path}: no such file")
            with _named(path), safe_open(path, framework="pt") as file:
                self._where.update(dict.fromkeys(file.keys(), path))

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._where.keys()

    def tensor(
        self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None
    ) -> Tensor:
        """Load one tensor, checked for its shape and for NaN and infinities."""
        path = self._where.get(name)
        if path is None:
            raise ValueError(f"{self.folder}: no tensor {name!r}")
        with _named(path), safe_open(path, framework="pt", device=str(device)) as file:
            value: Tensor = file.get_tensor(name)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{path}: {name}: expected shape {list(shape)}, got {list(value.shape)}"
            )
        if not value.is_floating_point():
            raise ValueError(f"{path}: {name}: expected floating point, got {value.dtype}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name}: has NaN or infinite values")
        return value if dtype is None else value.to(dtype)

    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and 4 KiB evenly spaced in each tensor's bytes.

        Independent of sharding, and quick on any size: enough to tell which backbone an exit head
        was trained on, and no defence against an adversary.
        """
        entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in self.files:
            with _named(path), path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                entries[name] = (path, 8 + size, entry)
        digest = hashlib.sha256()
        for name in sorted(entries):
            path, start, entry = entries[name]
            begin, end = entry["data_offsets"]
            digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
            span = max(0, end - begin - _SAMPLE_BYTES)
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(start + begin + span * i // (_SAMPLES - 1))
                    digest.update(file.read(min(_SAMPLE_BYTES, end - begin)))
        return "sha256-sampled:" + digest.hexdigest()
