"""Which part of the package may import which: read from the source, imports inside functions too."""

import ast
import sys
from pathlib import Path

import pytest

import mamba_rsst


ROOT = Path(mamba_rsst.__file__).parent
# Ground floor first; a part imports from the parts named, and from itself.
FLOORS = {
    "models": set(),
    "pruning": set(),
    "supernet": {"pruning"},
    "errors": set(),
    "training": {"pruning", "models", "errors"},
    "hub": {"models", "pruning", "supernet", "training", "errors"},
    "convert": {"hub", "models", "errors"},
    "evaluation": {"models", "pruning", "supernet", "training"},
    "export": {"hub", "convert", "evaluation", "models", "pruning"},
    "lm_evaluation": {"models", "pruning", "evaluation", "hub", "errors"},
    "speed": {"models", "pruning", "supernet", "training", "evaluation", "errors", "_version"},
    "calibration": set(),
    "latency": {"pruning", "evaluation", "speed"},
    "report": {"models", "pruning", "supernet", "training"},
    "figures": {"report"},
    "card": {"report"},
    "saved_run": {"report", "training"},
    "html_page": {"figures"},
    "html_report": {"report", "figures", "html_page", "card", "saved_run", "training", "_version"},
    "sweep_report": {"report", "figures", "training"},
    "tasks": {"models", "pruning", "supernet", "training", "hub", "convert", "evaluation", "speed"},
}
TOP = ("recipe", "run", "sweep", "sweep_run", "commands", "cli", "__init__", "__main__")
# What else the ground floor may need. Some of it is optional there: its import stands in a `try`.
OPTIONAL = {"triton", "selective_scan_cuda"}
OUTSIDE = {"models": {"torch", "transformers", *OPTIONAL}, "pruning": {"torch", "tqdm"}, "supernet": {"torch"}}
FILES = sorted(ROOT.rglob("*.py"))


def imports_of(path):
    """(level, module, names) of every import; `import x` has level 0 and no names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(alias.name for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(path):
    """The parts of the package that a file imports, its own included."""
    package = ROOT.name
    for level, module, names in imports_of(path):
        if level == 0:
            if module.split(".")[0] != package:
                continue
            parts = module.split(".")[1:]
        else:
            where = [package, *path.relative_to(ROOT).parts[:-1]]
            base = where[: len(where) - (level - 1)]
            assert base, f"{path.name} imports from outside the package"
            parts = [*base[1:], *(module.split(".") if module else [])]
        yield from [parts[0]] if parts else names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_from_the_floors_below(path):
    part = part_of(path)
    if part in TOP or part == "_version":
        return
    assert part in FLOORS, f"{part} has no place in the table of floors"
    for other in imported_parts(path):
        assert other == part or other in FLOORS[part], f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_ground_floor_needs_little(path):
    allowed = OUTSIDE.get(part_of(path))
    if allowed is None:
        return
    for level, module, _ in imports_of(path):
        name = module.split(".")[0]
        assert level or name in allowed or name in sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "models").rglob("*.py")), ids=lambda path: path.name)
def test_models_import_their_siblings_alone(path):
    """Flat and relative: a Hub copy of the folder runs without the package, and transformers must find the files."""
    assert path.parent == ROOT / "models", "the folder is flat"
    for level, module, names in imports_of(path):
        if level:
            assert level == 1 and module and "." not in module, f"from {'.' * level}{module} import {names}"
            assert (path.parent / f"{module}.py").is_file()
        else:
            assert module.split(".")[0] != ROOT.name


def test_kernels_are_optional():
    for path in (ROOT / "models").glob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = {id(n) for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(name.split(".")[0] in OPTIONAL for name in names), path.name


def test_importing_the_package_is_cheap():
    """The trainer and all that it brings come when they are asked for."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert set(top) <= {"_version", "models", "pruning"}


def test_the_reader_of_imports_sees_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import a.b\nfrom . import c\ndef f():\n    from ..d import e\n")
    assert list(imports_of(path)) == [(0, "a.b", ()), (1, "", ("c",)), (2, "d", ("e",))]
