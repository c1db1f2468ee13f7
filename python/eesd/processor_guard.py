"""Custom logits processors: what they answer is checked, and that they answer by the prefix alone.

A verification calls a processor for prefixes that may be rejected, and in another order than plain
decoding would. One that remembers earlier calls would therefore write another text, so it is
refused: where its first answer cannot be had again, or where what it holds changes in a call.
"""

import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOST = 2000
"""Things looked at in one processor: a bias for each of many tokens is not worth more."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class GuardedProcessor:
    """A processor `(input_ids [1, n] int64, scores [1, V] float32) -> scores`."""

    def __init__(self, processor: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._processor = processor
        self._name = getattr(processor, "__qualname__", type(processor).__name__)
        self._held: dict[str, object] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Its answer, which is checked; it gets copies.

        Raises:
            TypeError, ValueError: it answers something else than scores, or keeps state. What it
                raises itself goes through.
        """
        answer = self._answer(input_ids, scores)
        held = contents(self._processor)
        if self._held is None:
            # The first call may set things up; the same call again must then change nothing.
            again = self._answer(input_ids, scores)
            same = torch.equal(again.nan_to_num(), answer.nan_to_num())
            self._held, held = held, contents(self._processor)
            if not same:
                raise self._refusal("answered the same call twice with different scores")
        if held != self._held:
            changed = [
                name for name in {**self._held, **held} if self._held.get(name) != held.get(name)
            ]
            raise self._refusal(f"{changed[0] or 'it'} changed in a call")
        return answer

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"logits_processor: {self._name}: keeps state across calls ({what}); expected scores "
            "that depend on input_ids and scores alone, since drafts are processed ahead"
        )

    def _answer(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Ordinary tensors, as under transformers: they can be kept and have a version.
        with torch.inference_mode(False), torch.no_grad():
            given = scores.to(torch.float32, copy=True)
            answer = self._processor(input_ids.clone(), given.clone())
        if not isinstance(answer, Tensor):
            got: object = type(answer).__name__
        elif answer.dtype is not torch.float32 or answer.device != given.device:
            got = f"{answer.dtype} on {answer.device}"
        elif answer.shape != given.shape:
            raise ValueError(
                f"logits_processor: {self._name}: expected scores of shape {list(given.shape)}, "
                f"got {list(answer.shape)}"
            )
        elif bool(((answer != answer) | (answer == torch.inf)).any()) and bool(
            (given < torch.inf).all()
        ):
            raise ValueError(f"logits_processor: {self._name}: returned NaN or +inf")
        else:
            return answer
        raise TypeError(
            f"logits_processor: {self._name}: expected float32 scores on {given.device}, got {got}"
        )


def contents(thing: object) -> dict[str, object]:
    """What an object holds, by path, so far as it is cheap to tell.

    Tensors count by identity and version, containers by their items, functions by their closure,
    other objects by their attributes. Generators of random numbers are left out: one that is seeded
    anew for each prefix does no harm, and another shows in the repeated first call.
    """
    found: dict[str, object] = {}
    visited: set[int] = set()
    todo: deque[tuple[str, Any]] = deque([("", thing)])
    while todo and len(found) < _MOST:
        path, value = todo.popleft()
        if isinstance(value, _PLAIN):
            found[path] = (type(value), repr(value) if isinstance(value, float) else value)
        elif isinstance(value, Tensor):
            found[path] = id(value), None if value.is_inference() else value._version
        elif isinstance(value, torch.Generator):
            continue
        elif id(value) not in visited:
            visited.add(id(value))
            parts = _parts(value)
            found[path] = id(value) if parts is None else (type(value), len(parts))
            todo.extend((f"{path}{name}", part) for name, part in (parts or {}).items())
    return found


def _parts(value: Any) -> dict[str, Any] | None:
    """The named parts of a thing; None for one without, which counts by identity."""
    if isinstance(value, dict):
        return {f"[{key!r}]": item for key, item in _first(value.items())}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        # A set's order is its own; that it changes is all that matters.
        return {f"[{i}]": item for i, item in enumerate(_first(value))} | {".length": len(value)}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {
            **{f" {name}": cell.cell_contents for name, cell in cells if _is_full(cell)},
            **{f".{name}": part for name, part in vars(value).items()},
            " defaults": value.__defaults__,
        }
    if isinstance(value, types.MethodType):
        return {"": value.__self__}
    if isinstance(value, functools.partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, (type, types.ModuleType)) or callable(getattr(value, "tobytes", None)):
        return {".bytes": value.tobytes()} if getattr(value, "nbytes", 1 << 20) < 1 << 16 else None
    names = [
        slot
        for kind in type(value).__mro__
        for slot in _as_tuple(vars(kind).get("__slots__", ()))
        if slot not in ("__dict__", "__weakref__") and hasattr(value, slot)
    ]
    attributes = {f".{name}": getattr(value, name) for name in names}
    if hasattr(value, "__dict__"):
        attributes |= {f".{name}": part for name, part in vars(value).items()}
    elif not names:
        return None
    return attributes


def _first(items: Any) -> list[Any]:
    return [item for item, _ in zip(items, range(_MOST), strict=False)]


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _as_tuple(slots: str | tuple[str, ...]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
