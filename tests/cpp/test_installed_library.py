"""A C++ program that knows nothing but an installed eesd: `find_package`, build, run.

Installs what the Python build left in `build/`, so that it costs one small compilation; from
nothing (a source archive, say) it builds the library first.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("installed")


def cmake(*arguments: object) -> str:
    beside_python = shutil.which("cmake", path=sysconfig.get_path("scripts"))
    tool = beside_python or shutil.which("cmake")
    if tool is None:
        pytest.skip("no cmake")
    run = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def installed(folder: Path) -> Path:
    """A prefix with the library, from the newest build of it or from a new one."""
    built = sorted(
        ROOT.glob("build/*/libeesd.*"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    if built:
        build = built[0].parent
    else:
        build = folder / "library"
        cmake("-S", ROOT, "-B", build, "-DEESD_CUDA=OFF")
        cmake("--build", build, "--target", "eesd", "--parallel", os.cpu_count() or 1)
    cmake("--install", build, "--prefix", folder / "prefix")
    return folder / "prefix"


def test_find_package_build_run(tmp_path: Path) -> None:
    prefix = installed(tmp_path)
    build = tmp_path / "program"
    cmake("-S", PROGRAM, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", build)
    run = subprocess.run([build / "engine"], capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith(": ok\n")
    if torch.cuda.is_available() and "built without" not in run.stdout:
        assert "cuda: same bits" in run.stdout
    for isa in ("generic", "avx2", "avx512"):  # at most what the machine has
        smoke = subprocess.run(
            [build / "smoke"], capture_output=True, text=True, check=False,
            env={**os.environ, "EESD_ISA": isa},
        )  # fmt: skip
        assert smoke.returncode == 0, smoke.stdout + smoke.stderr
