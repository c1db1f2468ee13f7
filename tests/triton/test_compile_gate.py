"""Every kernel compiles for sm_80, sm_90 and sm_100, can start, and spills no registers."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import eesd_kernels

HERE = Path(__file__).parent
KERNELS = Path(eesd_kernels.__file__).parent / "triton"
LAUNCHED = {
    "exit_draft": "prepare scan merge",
    "exit_topk": "prepare scan merge",
    "linear": "linear rms_norm",
    "rms_norm": "rms_norm",
    "sample_draft": "sample_draft",
    "rollback_kv": "rollback_kv",
    "rope_cache_write": "rope_cache_write",
    "swiglu": "swiglu",
    "target_law": "cutoffs",
    "tree_attention": "attend combine",
    "verify_linear": "cutoffs statistics walk weights levels mass dense_race",
    "verify_tree": "cutoffs statistics walk race",
}
"""What the gate's cases of an op launch between them: `_<name>_kernel`."""


OLDER = {"from_l2", "some_from_l2"}  # loads of what was there before a kernel's own launches
BEFORE_THE_WAIT = {
    # by the rules of launch.py
    "_combine_kernel": {"load"},  # lengths and ancestry, which the kernel before it waited for
    "_merge_kernel": {"load", "store"},  # of records, each of which tells whether it is written
}


def functions() -> list[ast.FunctionDef]:
    """All functions of `eesd_kernels/triton` at the top of a file."""
    return [
        node
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]


def launched_kernels() -> list[ast.FunctionDef]:
    """Of these, `_*_kernel`: two files may have one of a name."""
    return [node for node in functions() if node.name.endswith("_kernel")]


def calls_in_order(node: ast.AST) -> list[str]:
    """Names of what is called, as it stands in the source."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    calls.sort(key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0))
    return [
        call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        for call in calls
        if isinstance(call.func, (ast.Attribute, ast.Name))
    ]


def touches(name: str, known: dict[str, ast.FunctionDef]) -> set[str]:
    """Whether a call loads or stores, itself or by what it calls."""
    if name in OLDER:
        return set()
    if name in known:
        return set().union(*(touches(inner, known) for inner in calls_in_order(known[name])))
    if name == "store" or name.startswith("atomic_"):
        return {"store"}
    return {"load"} & {name}


def test_kernels_that_overlap_the_one_before_wait_for_it() -> None:
    """Before the wait nothing is read that an earlier launch may still write, and nothing written:
    it would most often pass."""
    known = {node.name: node for node in functions()}
    overlapping = [
        kernel
        for kernel in launched_kernels()
        if "PDL" in [argument.arg for argument in kernel.args.args]
    ]
    assert overlapping
    for kernel in overlapping:
        name, calls = kernel.name, calls_in_order(kernel)
        assert "gdc_wait" in calls, name
        # The last: a branch may have one of its own.
        last = len(calls) - calls[::-1].index("gdc_wait")
        early = set().union(*(touches(call, known) for call in calls[:last]))
        assert early <= BEFORE_THE_WAIT.get(name, set()), name


def test_every_kernel_is_in_a_case() -> None:
    assert set(LAUNCHED) == set(runpy.run_path(str(HERE / "gate_cases.py"))["CASES"])
    named = {f"_{name}_kernel" for names in LAUNCHED.values() for name in names.split()}
    assert named == {kernel.name for kernel in launched_kernels()}


@pytest.mark.parametrize("op", LAUNCHED)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_and_does_not_spill(arch: int, op: str) -> None:
    """All cases for sm_90, every second for the others, to spare minutes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parents[1])))}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / "compile_gate.py", str(arch), op, f"--every={1 + (arch != 90)}"],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if row["kernel"] is None], "a case that launched nothing"
    assert {row["kernel"] for row in rows} == {f"_{name}_kernel" for name in LAUNCHED[op].split()}
    spilled = [row for row in rows if row["stack"]]
    assert not spilled, spilled
    large = [row for row in rows if row["all_registers"] > 1 << 16]
    assert not large, "a program that could not start"
