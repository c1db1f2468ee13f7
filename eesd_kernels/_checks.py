"""Argument checks of the public functions: what was expected and what came, by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _shape_text(shape: Sequence[object]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


class Checks:
    """Checks the tensors of one call; named sizes are bound by the first tensor that has them."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {}
        self.device: tuple[torch.device, str] | None = None

    def tensor(
        self,
        name: str,
        value: object,
        shape: Sequence[str | int],
        dtypes: torch.dtype | Sequence[torch.dtype],
        *,
        contiguous: bool = False,
    ) -> Tensor:
        """Check one tensor; `shape` mixes sizes and names such as "R", each met once or equal."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name}: expected a tensor, got {type(value).__name__}")
        if value.dim() != len(shape):
            raise ValueError(
                f"{self.op}: {name}: expected shape {_shape_text(shape)}, "
                f"got {_shape_text(value.shape)}"
            )
        for axis, want in enumerate(shape):
            have = value.shape[axis]
            if isinstance(want, str):
                bound, owner = self.sizes.setdefault(want, (have, name))
                if bound != have:
                    raise ValueError(
                        f"{self.op}: {name}: expected shape {_shape_text(shape)} with {want} = "
                        f"{bound} as in {owner}, got {_shape_text(value.shape)}"
                    )
            elif want != have:
                raise ValueError(
                    f"{self.op}: {name}: expected shape {_shape_text(shape)}, "
                    f"got {_shape_text(value.shape)}"
                )
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if value.dtype not in allowed:
            want_types = " or ".join(str(d) for d in allowed)
            raise TypeError(f"{self.op}: {name}: expected dtype {want_types}, got {value.dtype}")
        if self.device is None:
            self.device = (value.device, name)
        elif value.device != self.device[0]:
            raise ValueError(
                f"{self.op}: {name}: expected device {self.device[0]} as {self.device[1]}, "
                f"got {value.device}"
            )
        if contiguous and not value.is_contiguous():
            raise ValueError(
                f"{self.op}: {name}: expected a contiguous tensor, got strides "
                f"{tuple(value.stride())} for shape {_shape_text(value.shape)}"
            )
        return value

    def outputs(
        self, out: object, forms: Sequence[tuple[Sequence[str | int], torch.dtype]]
    ) -> dict[str, Tensor]:
        """Check the tensors to write to; they are `out0`, .. of the op's `out` form."""
        if not isinstance(out, (tuple, list)):
            raise TypeError(f"{self.op}: out: expected a tuple, got {type(out).__name__}")
        if len(out) != len(forms):
            raise ValueError(f"{self.op}: out: expected {len(forms)} tensors, got {len(out)}")
        return {
            f"out{i}": self.tensor(f"out[{i}]", tensor, shape, dtype, contiguous=True)
            for i, (tensor, (shape, dtype)) in enumerate(zip(out, forms, strict=True))
        }

    def size(self, name: str, low: int) -> None:
        """Check that a size that a tensor has bound is at least `low`."""
        size, owner = self.sizes[name]
        if size < low:
            raise ValueError(f"{self.op}: {owner}: expected {name} at least {low}, got {size}")

    def number(self, name: str, value: object, low: float, high: float) -> None:
        """Check that a Python number lies in `[low, high]`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.op}: {name}: expected a number, got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{self.op}: {name}: expected {low} to {high}, got {value}")

    def integer(self, name: str, value: object, low: int, high: int) -> None:
        """Check that a Python integer lies in `[low, high]`."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.op}: {name}: expected an integer, got {value!r}")
        self.number(name, value, low, high)
