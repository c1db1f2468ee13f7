"""What launches ask of the device, and how one may start before the launch ahead of it has ended.

A kernel with the constant `PDL` is launched with `**overlap(tensor)` (programmatic dependent
launch, from Hopper on). It calls `gdc_wait` before it reads what an earlier launch wrote or writes
what one may still read, and `gdc_launch_dependents` where the next may take its place on the GPU.
Every program does call `gdc_wait`, be it last of all, so that the end of a launch is the end of all
before it. Behind a release that comes before the wait, the next may start while launches further
back still run: what it reads before its own wait must be older than they are.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime.driver import driver


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """90 for Hopper; 0 in the interpreter."""
    if device.type == "cpu":
        return 0
    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; those of an H100 where nothing runs."""
    if device.type != "cuda":
        return 227 * 1024
    properties = driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def overlap(tensor: Tensor, allowed: bool = True) -> dict[str, bool]:
    """Keywords of a launch on the tensor's device."""
    pdl = allowed and architecture(tensor.device) >= 90
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
