"""Compile every Triton kernel for one architecture, without a GPU, and report what each uses.

`python compile_gate.py 90 [op ...]` calls the package's own launchers on meta tensors of real
models' shapes (`gate_cases.py`) with Triton's launch replaced by a compile, so that what is
compiled is what would run; `--every 2` takes every second case of an op. It prints one JSON line a
kernel: op, case, kernel, registers (of a thread), all_registers (of a program, as they are given
out), stack (bytes spilled to memory).
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from gate_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _NoDevice:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found.get("LOCAL", 0)),
    }


def main(arch: int, only: list[str], every: int = 1) -> None:
    driver.set_active(_NoDevice(arch))  # type: ignore[arg-type]
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    known: dict[str, dict[str, int]] = {}
    for op, cases in CASES.items():
        if only and op not in only:
            continue
        for case, call in islice(cases.items(), None, None, every):
            compiled.clear()
            call()
            for name, kernel in compiled:
                if kernel.hash not in known:
                    used = resources(kernel.asm["cubin"])
                    warp = -(-used["registers"] // 8) * 8 * 32
                    used["all_registers"] = warp * kernel.metadata.num_warps
                    known[kernel.hash] = used
                print(json.dumps({"op": op, "case": case, "kernel": name, **known[kernel.hash]}))
            if not compiled:
                print(json.dumps({"op": op, "case": case, "kernel": None}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, help="90 is sm_90")
    parser.add_argument("op", nargs="*", help="all ops if none is named")
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.arch, arguments.op, arguments.every)
