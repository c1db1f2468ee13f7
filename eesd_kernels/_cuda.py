"""CUDA implementations of `csrc/cuda`: tensors in, `eesd_kernels._C` over their addresses.

Each enqueues one launch on the current stream of the tensors' device and returns; nothing is read
back. A name is None where `_C` was built without CUDA, and the reference then serves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from eesd_kernels import _C, _cpu

_F = TypeVar("_F", bound=Callable[..., Any])


@contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int]:
    """The address of the current stream of the tensor's device, which is made the current one."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream(tensor.device).cuda_stream


def _on_stream(function: _F) -> _F | None:
    """`function` of `_cpu` on device tensors: their addresses, and the stream."""
    if not _C.with_cuda:
        return None

    def on_device(first: Tensor, *rest: Any) -> Any:
        with _stream_of(first) as stream:
            return function(first, *rest, stream=stream)

    return on_device  # type: ignore[return-value]


philox_words_cuda = _on_stream(_cpu.philox_words_cpu)
sample_beta_cuda = _on_stream(_cpu.sample_beta_cpu)
thompson_draft_length_cuda = _on_stream(_cpu.thompson_draft_length_cpu)
thompson_look_cuda = _on_stream(_cpu.thompson_look_cpu)
thompson_update_cuda = _on_stream(_cpu.thompson_update_cpu)
