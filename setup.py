"""Builds eesd_kernels._C with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        import pybind11  # a build requirement, absent when only metadata is asked for

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            # Named anew each time: an isolated build's ninja is gone by the next one, and a cache
            # that remembers it fails to configure.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "EESD_PYTHON": "ON",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        extra = os.environ.get("CMAKE_ARGS", "").split()
        build = ROOT / "build" / self._toolchain_key(extra)
        build.mkdir(parents=True, exist_ok=True)
        jobs = self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run([*configure, *extra], check=True)
        subprocess.run(
            ["cmake", "--build", str(build), "--target", "_C", "--parallel", str(jobs)], check=True
        )

    def _toolchain_key(self, extra: list[str]) -> str:
        """A build folder per toolchain and options, so that none inherits another's cache."""
        version = subprocess.run(
            ["cmake", "--version"], check=True, capture_output=True, text=True
        ).stdout
        compilers = [os.environ.get(name, "") for name in ("CXX", "CUDACXX", "CXXFLAGS")]
        identity = [version, *compilers, *extra, sys.prefix, str(self.debug)]
        digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:12]
        return f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{digest}"


setup(ext_modules=[CMakeExtension("eesd_kernels._C")], cmdclass={"build_ext": CMakeBuild})
