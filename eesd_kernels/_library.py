"""Registration of the ops with `torch.library`, namespace `eesd`.

`Library.define` and `impl` cost 1.4 to 2.2 us a call, `torch.library.custom_op` 7 to 10 us;
a decoding step makes some two hundred calls.
"""

from collections.abc import Callable
from typing import Any

import torch

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
    what `cuda` is made of: "Triton", or "CUDA" where it is of `eesd_kernels._cuda`.
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
    return getattr(torch.ops.eesd, name).default


def implementations() -> dict[str, dict[str, str]]:
    """Which implementation each op uses: `{op: {"cpu": ..., "cuda": ...}}`."""
    return {name: dict(devices) for name, devices in sorted(_IMPLEMENTATIONS.items())}
