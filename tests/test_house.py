"""The house: arrows point down, imports stay light, one version, no machine's paths."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOOR = ("__init__.py", "generate")
HEAVY = ("eesd", "transformers", "triton")


def tracked_files() -> list[Path]:
    """The repository's own files: what git tracks or would, without what it ignores."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def python_files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(top-level package, enclosing top-level function or None) of each absolute import."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = statement.name if isinstance(statement, ast.FunctionDef) else None
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0], inside


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.M)


def fresh_interpreter(code: str) -> str:
    """What `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_know_nothing_of_the_orchestrator() -> None:
    upward = [
        (path.relative_to(ROOT / "eesd_kernels").as_posix(), inside)
        for path in python_files("eesd_kernels")
        for package, inside in imports(path)
        if package == "eesd"
    ]
    assert upward == [("__init__.py", "__getattr__")]


def test_kernels_know_no_models() -> None:
    allowed_outside = {"torch", "triton", "numpy", "eesd", "eesd_kernels"}
    for path in python_files("eesd_kernels"):
        packages = {package for package, _ in imports(path)}
        assert packages <= allowed_outside | set(sys.stdlib_module_names), path


def test_ground_floor_knows_neither_python_nor_torch() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        named = includes(path)
        assert not [name for name in named if re.match(r"torch/|ATen/|c10/", name)], path
        if (ROOT / "csrc" / "python") not in path.parents:
            assert not [name for name in named if re.match(r"Python\.h|pybind11/", name)], path


def test_public_headers_include_only_public_headers() -> None:
    folder = ROOT / "csrc" / "include" / "eesd"
    for path in sorted(folder.glob("*.h")):
        for name in includes(path):
            own = name.removeprefix("eesd/")
            assert "/" not in own, (path, name)
            assert own == name or (folder / own).is_file(), (path, name)


def test_importing_the_kernels_is_light() -> None:
    code = f"import sys, eesd_kernels; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert fresh_interpreter(code) == "[]"


def test_importing_the_command_is_light() -> None:
    heavy = ("torch", "numpy", "eesd_kernels", "tokenizers")
    code = f"import sys, eesd, eesd.cli; print([m for m in {heavy!r} if m in sys.modules])"
    assert fresh_interpreter(code) == "[]"


@pytest.mark.parametrize(
    "first",
    [
        "import eesd.generation",
        "import eesd.cli.compare",
        "import eesd_kernels; eesd_kernels.generate",
    ],
)
def test_generate_is_the_function_whatever_came_first(first: str) -> None:
    code = (
        f"{first}\nimport types, eesd, eesd_kernels\nfrom eesd import generate, load\n"
        "import eesd.generation\n"
        "assert isinstance(generate, types.FunctionType) and isinstance(load, types.FunctionType)\n"
        "assert eesd.generate is generate is eesd_kernels.generate is eesd.generation.generate\n"
        "assert set(eesd.__all__) <= set(dir(eesd))\n"
        "try:\n    eesd.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert fresh_interpreter(code) == "module 'eesd' has no attribute 'nothing'"


def test_no_submodule_has_the_name_of_a_public_function() -> None:
    """`import eesd.<name>` would put the module where users expect the function."""
    init = ast.parse((ROOT / "python/eesd/__init__.py").read_text())
    named = [
        n for n in init.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    ]
    for name in ast.literal_eval(named[0].value):
        assert not (ROOT / "python/eesd" / f"{name}.py").exists(), name
        assert not (ROOT / "python/eesd" / name).exists(), name


def test_no_machine_paths() -> None:
    pattern = re.compile(rb"(?<![\w.$}])/(?:home|root|work|Users|mnt|opt|data|scratch)/[A-Za-z]\w+")
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if path.suffix not in {".safetensors", ".png"} and path != Path(__file__)
        for match in [pattern.search(path.read_bytes())]
        if match
    ]
    assert not found, found


def test_the_version_is_stated_once() -> None:
    version = re.search(
        r'^__version__ = "([^"]+)"', (ROOT / "eesd_kernels/_version.py").read_text(), re.M
    )
    assert version
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "python/eesd/__init__.py"):
        assert version[1] not in (ROOT / name).read_text(), name
    from eesd_kernels import _C, __version__

    assert __version__ == version[1] == _C.version()
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
