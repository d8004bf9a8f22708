"""Dependencies point one way (CONTRIBUTING.md, "The house, lowest layer first")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["base", "gguf", "quant", "model", "cpu", "engine", "bindings"]
# A plug-in: a library of its own, of these layers, the interface that it has with the engine and its records.
PLUGIN, PLUGIN_USES = "cuda", {"base", "quant", "cuda"}
INTERFACE = {Path("model/backend_abi.h"), Path("model/profile.h")}
STAND_IN = "stand_in"  # tests/native/stand_in, where a C++ compiler builds the kernels
SOURCES = {".h", ".cpp", ".cu", ".cuh"}
# The vector type of each instruction set is its own folder's; only dispatch may know that there are several.
INSTRUCTION_SETS = {"generic", "avx2", "avxvnni", "avx512", "avx512bf16", "neon", "dotprod", "i8mm"}
# Whose table is another's with some kernels replaced.
EXTENDS = {"avxvnni": {"avx2"}, "avx512bf16": {"avx512"}, "dotprod": {"neon"}, "i8mm": {"neon", "dotprod"}}
# The rooms of python/qwen2vl_q, each with those that it uses: `model` is model.py, `convert` the folder.
ROOM_USES = {
    "base": set(),
    "checkpoint": {"base"},
    "vision": {"base"},
    "text": {"base"},
    "chat": {"base", "vision", "text"},
    "engine": {"base", "checkpoint", "vision", "text", "chat"},
    "tasks": {"base", "vision"},
    "hub": {"base", "engine", "convert"},
    "model": {"base", "vision", "text", "chat", "engine", "tasks", "hub"},
    "measure": {"base", "checkpoint", "vision", "chat", "engine", "model", "demo"},
    "demo": set(),
    "convert": {"base", "checkpoint", "vision", "text", "chat", "engine"},
    "serve": {"base", "vision", "chat", "engine", "model"},
    "cli": {"base", "vision", "text", "chat", "engine", "tasks", "hub", "model", "measure", "demo", "serve"},
}
# Those that use the converter.
COMMANDS_THAT_WRITE = {
    "cli/convert.py",
    "cli/converting.py",
    "cli/quantize.py",
    "cli/split.py",
    "cli/merge.py",
}
# Verification reads checkpoints through it, and benchmarks make files.
MEASURES_OF_CHECKPOINTS = {"measure/model_source.py", "measure/comparable.py"}
# Beside the rooms: the names that users import, the command, the native module.
PORCH = {"__init__", "__main__"}

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def native_includes() -> list[tuple[Path, Path]]:
    """(file, included file), both relative to csrc/, of every quoted include."""
    found = []
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in SOURCES:
            for target in re.findall(
                r'^\s*#include "([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE
            ):
                found.append((file.relative_to(ROOT / "csrc"), Path(target)))
    return found


def test_native_layers_include_only_lower_ones() -> None:
    includes = native_includes()
    assert len(includes) > 50
    wrong = [
        f"{file} includes {target}"
        for file, target in includes
        if file.parts[0] != PLUGIN
        and (target.parts[0] == PLUGIN or LAYERS.index(file.parts[0]) < LAYERS.index(target.parts[0]))
    ]
    assert wrong == []


def test_the_plugin_is_a_house_of_its_own() -> None:
    includes = [(file, target) for file, target in native_includes() if file.parts[0] == PLUGIN]
    assert len(includes) > 10
    wrong = [
        f"{file} includes {target}"
        for file, target in includes
        if target.parts[0] not in PLUGIN_USES | {STAND_IN} and target not in INTERFACE
    ]
    assert wrong == []


def test_the_registry_alone_knows_the_backends() -> None:
    knowing = {
        str(file)
        for file, target in native_includes()
        if file.parts[0] == "engine" and (target.parts[0] == "cpu" or target.name == "plugin_backend.h")
    }
    assert knowing == {"engine/backend_registry.cpp", "engine/plugin_backend.cpp"}


def test_kernels_include_nothing_above_panels() -> None:
    allowed = {"base", "quant"}
    wrong = [
        f"{file} includes {target}"
        for file, target in native_includes()
        if file.parts[:2] == ("cpu", "kernels")
        and target.parts[0] not in allowed
        and target.parts[:2] != ("cpu", "kernels")
        and target not in (Path("cpu/panel_matrix.h"), Path("cpu/panel_decoder.h"))
    ]
    assert wrong == []


def test_instruction_sets_do_not_know_each_other() -> None:
    wrong = []
    for file, target in native_includes():
        own = set(file.parts) & INSTRUCTION_SETS
        allowed = own.union(*(EXTENDS.get(name, set()) for name in own))
        other = (set(target.parts) & INSTRUCTION_SETS) - allowed
        if other:
            wrong.append(f"{file} includes {target}")
    assert wrong == []


def test_pybind11_stays_in_bindings() -> None:
    users = {
        file.relative_to(ROOT / "csrc").parts[0]
        for file in (ROOT / "csrc").rglob("*")
        if file.suffix in SOURCES and "pybind11" in file.read_text(encoding="utf-8")
    }
    assert users == {"bindings"}


def imported_modules(file: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_only_its_commands_and_the_hub_import_the_converter() -> None:
    importers = {
        str(file.relative_to(ROOT / "python/qwen2vl_q"))
        for file in (ROOT / "python").rglob("*.py")
        if any(module.startswith("qwen2vl_q.convert") for module in imported_modules(file))
    }
    assert importers == COMMANDS_THAT_WRITE | MEASURES_OF_CHECKPOINTS | {"hub/conversion.py"}


def room_of(parts: tuple[str, ...]) -> str:
    return Path(parts[0]).stem if parts else "__init__"


def python_imports() -> list[tuple[Path, str, str]]:
    """(file, its room, room that it imports from) of every import inside the package."""
    found = []
    for folder, base in (("python/qwen2vl_q", ()), ("convert", ("convert",))):
        for file in sorted((ROOT / folder).rglob("*.py")):
            room = room_of((*base, *file.relative_to(ROOT / folder).parts))
            for module in imported_modules(file):
                package, *inner = module.split(".")
                if package == "qwen2vl_q" and inner and inner[0] in ROOM_USES:
                    found.append((file.relative_to(ROOT), room, inner[0]))
    return found


def test_python_rooms_import_only_those_below() -> None:
    imports = python_imports()
    assert {room for _, room, _ in imports} >= ROOM_USES.keys() - {"base", "demo"}
    wrong = [
        f"{file} imports from {target}"
        for file, room, target in imports
        if room not in PORCH
        and target != room
        and target not in ROOM_USES[room]
        and not (
            target == "convert"
            and str(file).removeprefix("python/qwen2vl_q/") in COMMANDS_THAT_WRITE | MEASURES_OF_CHECKPOINTS
        )
    ]
    assert wrong == []


def test_the_rooms_are_all_there_is() -> None:
    package = ROOT / "python/qwen2vl_q"
    entries = {
        entry.stem
        for entry in package.iterdir()
        if entry.suffix == ".py" or (entry.is_dir() and list(entry.glob("*.py")))
    }
    assert entries == (ROOM_USES.keys() | PORCH) - {"convert"}


def test_rooms_of_the_command_line_do_not_import_each_other_in_a_circle() -> None:
    uses = {
        file.stem: {m.split(".")[2] for m in imported_modules(file) if m.startswith("qwen2vl_q.cli.")}
        for file in (ROOT / "python/qwen2vl_q/cli").glob("*.py")
    }
    reached: dict[str, set[str]] = {}

    def reach(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in reached:
            reached[name] = {name}.union(*(reach(n, (*path, name)) for n in uses.get(name, ())))
        return reached[name]

    for name in uses:
        reach(name, ())
