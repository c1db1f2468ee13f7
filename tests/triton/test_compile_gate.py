"""Every kernel compiles for sm_80, sm_90 and sm_100, and none spills registers to memory."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eesd_kernels

HERE = Path(__file__).parent
KERNELS = Path(eesd_kernels.__file__).parent / "triton"


def launched_kernels() -> dict[str, ast.FunctionDef]:
    """All functions `_*_kernel` of `eesd_kernels/triton` by name."""
    return {
        node.name: node
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def test_kernels_that_overlap_the_one_before_wait_for_it() -> None:
    """Without the wait they would read what is not yet written, and most often pass."""
    overlapping = {
        name: kernel
        for name, kernel in launched_kernels().items()
        if "PDL" in [argument.arg for argument in kernel.args.args]
    }
    assert overlapping
    for name, kernel in overlapping.items():
        calls = [node.func for node in ast.walk(kernel) if isinstance(node, ast.Call)]
        names = [call.attr if isinstance(call, ast.Attribute) else call.id for call in calls
                 if isinstance(call, (ast.Attribute, ast.Name))]  # fmt: skip
        assert "gdc_wait" in names, name


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_and_does_not_spill(arch: int) -> None:
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / "compile_gate.py", str(arch)],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if row["kernel"] is None], "a case that launched nothing"
    assert {row["kernel"] for row in rows} == set(launched_kernels())
    spilled = [row for row in rows if row["stack"]]
    assert not spilled, spilled
