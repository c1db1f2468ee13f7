"""Registration of the ops with `torch.library`, namespace `eesd`.

`Library.define` and `impl` cost 1.4 to 2.2 us a call, `torch.library.custom_op` 7 to 10 us;
a decoding step makes some two hundred calls. Each op that returns tensors has a form that writes
into given ones, `eesd::<op>.out`, for engines that replay CUDA graphs.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("eesd", "DEF")

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {}


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    cuda_is: str = "Triton",
) -> Callable[..., Any]:
    """Define `eesd::<op>` and return the overload that callers invoke.

    The reference serves every device for which no faster implementation is given. `cuda_is` says
    what `cuda` is made of: "Triton" (`triton_op`), or "CUDA" where it is of `eesd_kernels._cuda`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu or reference, "CPU")
    _LIBRARY.impl(name, cuda or reference, "CUDA")
    torch.library.register_fake(f"eesd::{name}", fake, lib=_LIBRARY)
    _IMPLEMENTATIONS[name] = {
        "cpu": "C++" if cpu else "PyTorch reference",
        "cuda": cuda_is if cuda else "PyTorch reference",
    }
    arguments, _, returns = schema.partition(" -> ")
    if returns != "()":
        into = isinstance(cuda, _TritonOp)
        _register_out(name, arguments, returns, cpu or reference, cuda or reference, into)
    return getattr(torch.ops.eesd, name).default


def _register_out(
    name: str,
    arguments: str,
    returns: str,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    cuda_writes: bool,
) -> None:
    """Define `eesd::<op>.out`, the same with `out0`, `out1`, ... to write to, returning nothing."""
    count = returns.count("Tensor")
    outs = ", ".join(f"Tensor({chr(ord('q') + i)}!) out{i}" for i in range(count))
    _LIBRARY.define(f"{arguments.replace('(', '.out(', 1)[:-1]}, *, {outs}) -> ()")

    def copying(function: Callable[..., Any]) -> Callable[..., None]:
        def run(*args: Any, **out: Tensor) -> None:
            results = function(*args)
            for target, value in zip(
                out.values(), (results,) if count == 1 else results, strict=True
            ):
                target.copy_(value)

        return run

    def writing(*args: Any, **out: Tensor) -> None:
        cuda(*args, out=tuple(out.values()))

    _LIBRARY.impl(f"{name}.out", copying(cpu), "CPU")
    _LIBRARY.impl(f"{name}.out", writing if cuda_writes else copying(cuda), "CUDA")
    torch.library.register_fake(f"eesd::{name}.out", lambda *_, **__: None, lib=_LIBRARY)


class _TritonOp:
    """`eesd_kernels.triton.<op>.<op>`, imported at its first call.

    It takes the op's arguments and `out`, a tuple of tensors to write to or None, and returns the
    results, or None for arguments that it does not take (float64), which the reference then does.
    Triton launches on the current device: here that is the first tensor's.
    """

    def __init__(self, op: str, reference: Callable[..., Any]) -> None:
        self._op, self._reference = op, reference
        self._kernel: Callable[..., Any] | None = None

    def __call__(self, *args: Any, out: tuple[Tensor, ...] | None = None) -> Any:
        if self._kernel is None:
            try:
                module = import_module(f"eesd_kernels.triton.{self._op}")
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise RuntimeError(
                    f"{self._op}: on CUDA tensors expected the package triton, found none"
                ) from None
            self._kernel = getattr(module, self._op)
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.cuda.device(device):
            results = self._kernel(*args, out=out)
        if results is not None:
            return results
        results = self._reference(*args)
        if out is None:
            return results
        for target, value in zip(
            out, (results,) if isinstance(results, Tensor) else results, strict=True
        ):
            target.copy_(value)
        return results


def triton_op(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton implementation of an op: a machine without a GPU never imports Triton."""
    return _TritonOp(op, reference)


def implementations() -> dict[str, dict[str, str]]:
    """Which implementation each op uses: `{op: {"cpu": ..., "cuda": ...}}`."""
    return {name: dict(devices) for name, devices in sorted(_IMPLEMENTATIONS.items())}
