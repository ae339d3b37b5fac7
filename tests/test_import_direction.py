"""The direction of dependencies of DESIGN.md section 3, and what may not be loaded early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Every part of placer, lowest layer first. A part may import its own layer and those below it;
# the parts of one group in SEPARATE may not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "wording", "files", "placement"),
    ("trace", "cluster"),
    ("plan", "plan_schema", "cost", "affinity", "tracer", "models"),
    ("baselines", "evaluation", "planning", "load_planning", "comparison", "timing"),
    ("studies",),
    ("sweep",),
    ("report", "runtime", "engines"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
SEPARATE = [
    {"trace", "cluster"},
    {"cost", "affinity", "tracer"},
    {"report", "runtime", "engines"},
]
HEAVY = {
    "torch",
    "ortools",
    "scipy",
    "numba",
    "transformers",
    "pulp",
    "networkx",
    "pyarrow",
    "matplotlib",
}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every absolute import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module == "placer":  # names a module of placer, or __version__
                for alias in node.names:
                    yield node.lineno, f"placer.{alias.name}"
            else:
                yield node.lineno, node.module


def part_of(module: str) -> str:
    """`placer.cost.kernels` -> `cost`; `placer` itself and what it defines -> ''."""
    parts = module.split(".")
    return "" if len(parts) < 2 or parts[1].startswith("__version") else parts[1]


def violations(path: Path, part: str) -> list[str]:
    found = []
    for line, module in imported_modules(path):
        if module.split(".")[0] != "placer":
            continue
        other = part_of(module)
        if other in ("", part):
            continue
        if other not in RANK:
            found.append(f"{path}:{line}: {other} has no layer")
        elif RANK[other] > RANK[part]:
            found.append(f"{path}:{line}: {part} imports {other}, which lies above it")
        elif any({part, other} <= group for group in SEPARATE):
            found.append(f"{path}:{line}: {part} imports its neighbour {other}")
    return found


def parts_of_placer() -> list[tuple[str, list[Path]]]:
    parts = []
    for entry in sorted((ROOT / "placer").iterdir()):
        if entry.name == "__init__.py" or entry.name.startswith((".", "__pycache__")):
            continue
        if entry.is_dir() and any(entry.glob("*.py")):
            parts.append((entry.name, sorted(entry.rglob("*.py"))))
        elif entry.suffix == ".py":
            parts.append((entry.stem, [entry]))
    return parts


@pytest.mark.parametrize(("part", "files"), parts_of_placer(), ids=lambda value: str(value)[:20])
def test_a_part_imports_only_what_lies_below_it(part, files):
    assert part in RANK, f"give placer/{part} a layer in this test"
    assert [line for path in files for line in violations(path, part)] == []


def test_solvers_never_imports_placer():
    found = [
        f"{path}:{line}: {module}"
        for path in sorted((ROOT / "solvers").rglob("*.py"))
        for line, module in imported_modules(path)
        if module.split(".")[0] == "placer"
    ]
    assert found == []


def test_solvers_knows_no_files_torch_or_command_line():
    found = [
        f"{path}:{line}: {module}"
        for path in sorted((ROOT / "solvers").rglob("*.py"))
        for line, module in imported_modules(path)
        if module.split(".")[0] in {"torch", "transformers", "typer", "rich", "pyarrow", "pydantic"}
    ]
    assert found == []


def test_an_import_against_the_direction_is_noticed(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(
        "from placer.errors import PlacerError\n"
        "def late():\n    from placer.cli.app import main\n    return main\n"
    )
    assert len(violations(file, "cost")) == 1
    assert violations(file, "cli") == []
    file.write_text("import placer.affinity.counts\n")
    assert len(violations(file, "cost")) == 1
    file.write_text("from placer import report\n")
    assert len(violations(file, "planning")) == 1


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after `code`."""
    program = (
        "import sys\n"
        f"{code}\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import placer",
        "import placer.cli.app",
        "from placer.trace import open_trace; from placer.plan import read_plan",
        "import placer.cost",
        "import placer.planning, placer.evaluation, placer.comparison",
    ],
)
def test_importing_loads_nothing_heavy(code):
    assert loaded_after(code) & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["solve", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        f"sys.argv = ['placer', *{arguments!r}]\n"
        "import runpy\n"
        "try:\n    runpy.run_module('placer', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert loaded_after(code) & HEAVY == set()


def test_importing_solvers_loads_no_solver_library():
    assert loaded_after("import solvers") & {"torch", "ortools", "scipy", "pulp"} == set()
