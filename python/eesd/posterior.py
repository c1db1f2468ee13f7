"""What a controller has learned of a head's drafts, to look at, keep and give back."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FIELDS = ("alpha", "beta")


@dataclass(frozen=True, eq=False)
class Posterior:
    """Beta(alpha, beta) over the chance that a drafted token is accepted, a sequence each.

    alpha, beta: float32 `[B]`, or `[B, buckets]` under the calibrated schedule, which keeps one for
    each bucket of the exit's top probability. All are above 0 and finite.

    Raises:
        TypeError, ValueError: on making one of anything else.
    """

    alpha: Tensor
    beta: Tensor

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype is not torch.float32:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"posterior: {name}: expected a float32 tensor, got {got}")
            if value.dim() not in (1, 2) or not value.numel():
                raise ValueError(
                    f"posterior: {name}: expected shape [B] or [B, buckets], "
                    f"got {list(value.shape)}"
                )
            if not bool(((value > 0) & value.isfinite()).all()):
                raise ValueError(f"posterior: {name}: expected values above 0 and finite")
        if self.alpha.shape != self.beta.shape or self.alpha.device != self.beta.device:
            raise ValueError(
                f"posterior: beta: expected {list(self.alpha.shape)} on {self.alpha.device} as "
                f"alpha, got {list(self.beta.shape)} on {self.beta.device}"
            )

    def __len__(self) -> int:
        """Sequences."""
        return len(self.alpha)

    @property
    def buckets(self) -> int | None:
        """Buckets of the calibrated schedule; None under the others."""
        return self.alpha.shape[1] if self.alpha.dim() == 2 else None

    def marginal(self) -> list[tuple[float, float]]:
        """alpha and beta a sequence, summed over buckets where there are some."""
        alpha, beta = (t.reshape(len(t), -1).sum(1).tolist() for t in (self.alpha, self.beta))
        return list(zip(alpha, beta, strict=True))

    def sequence(self, index: int) -> "Posterior":
        """That of one sequence, B = 1, which `generate` takes for a batch of any size."""
        one = range(len(self))[index]
        return Posterior(self.alpha[one : one + 1].clone(), self.beta[one : one + 1].clone())

    def to(self, device: str | torch.device) -> "Posterior":
        """A copy on another device."""
        return Posterior(self.alpha.to(device, copy=True), self.beta.to(device, copy=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, as `save` writes them."""
        return {name: getattr(self, name).tolist() for name in _FIELDS}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Posterior":
        """On the CPU; `ValueError` names a field that is missing, unknown or no list of numbers."""
        if not isinstance(content, Mapping):
            raise ValueError(f"posterior: expected an object, got {type(content).__name__}")
        for name in content:
            if name not in _FIELDS:
                raise ValueError(f"posterior: unknown field {name!r}")
        values = []
        for name in _FIELDS:
            if name not in content:
                raise ValueError(f"posterior: {name} is missing")
            try:
                values.append(torch.tensor(content[name], dtype=torch.float32))
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(
                    f"posterior: {name}: expected numbers, one or one list a sequence"
                ) from None
        return cls(*values)

    def save(self, path: str | Path) -> None:
        """Write JSON; the file appears whole or not at all. Its folder is made where missing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(json.dumps(self.to_dict()) + "\n")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Read what `save` wrote, onto the CPU; `ValueError` names the file and what is wrong."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(content)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
            raise ValueError(f"{path}: not a saved posterior: {error}") from None


def check_prior(prior: Any) -> tuple[float, float]:
    """`assistant_prior` as two floats above 0."""
    if not isinstance(prior, (list, tuple)) or len(prior) != 2:
        raise TypeError(f"assistant_prior: expected two numbers (alpha, beta), got {prior!r}")
    for value in prior:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"assistant_prior: expected numbers, got {value!r}")
        # As float32, and divided over buckets, it must still be above 0.
        if not (math.isfinite(value) and 1e-30 <= value <= 1e30):
            raise ValueError(f"assistant_prior: expected values of 1e-30 to 1e30, got {value}")
    return float(prior[0]), float(prior[1])
