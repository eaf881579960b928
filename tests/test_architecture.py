"""The house as tests: who may import whom, what an import costs, how long code may be, what the README must name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import tracer
from tracer import config

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = sorted(p for folder in ("tracer", "exporters", "deploy") for p in (ROOT / folder).rglob("*.py"))
PACKAGES: Final = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "deploy"]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY: Final = ("torch", "vllm", "zarr", "xarray", "numpy", "opentelemetry", "fastapi")

FUNCTION_LINES: Final = 60
FUNCTION_LINES_P95: Final = 40
FILE_LINES: Final = 400


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """(where, lines) of each function of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{_name(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def _exported(path: Path) -> list[str] | None:
    """`__all__` as written; None if the file has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def _rank(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by the alphabet: the order ruff's RUF022 keeps."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


def test_import_contracts() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_module_has_a_row() -> None:
    """A new module of tracer goes into the layers of pyproject.toml, or nobody watches what it imports."""
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    rows = {name for layer in contracts[0]["layers"] for name in re.findall(r"tracer\.(\w+)", layer)}
    modules = {
        path.relative_to(ROOT / "tracer").parts[0].removesuffix(".py") for path in (ROOT / "tracer").rglob("*.py")
    }
    assert modules - {"__init__"} - rows == set()


def test_one_version() -> None:
    assert tracer.__version__ == PROJECT["project"]["version"]


def test_import_tracer_is_cheap() -> None:
    code = f"import sys, tracer; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_disabled_plugin_imports_nothing_heavy() -> None:
    """vLLM loads the plugin in each process of each server: installed but not enabled, it must cost nothing."""
    code = (
        "import sys; from tracer.worker.plugin import register; register(); "
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={})
    assert run.stdout.split() == []


@pytest.mark.parametrize("path", [p for p in PACKAGES if _exported(p) is not None], ids=_name)
def test_all_is_sorted(path: Path) -> None:
    exported = _exported(path)
    assert exported == sorted(exported or [], key=_rank)


def test_public_modules_declare_all() -> None:
    silent = [_name(p) for p in PACKAGES if p.name != "__init__.py" and _exported(p) is None]
    assert silent == []


def test_readme_names_every_setting() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name, _, _ in config.reference() if not re.search(rf"\b{name}\b", readme)] == []


def test_environment_is_read_in_one_file() -> None:
    reading = re.compile(r"\bos\.(environ|getenv|putenv)\b|\bfrom os import .*\b(environ|getenv)\b")
    readers = {_name(p) for p in PACKAGES if reading.search(p.read_text(encoding="utf-8"))}
    assert readers <= {"tracer/config.py"}


def test_files_are_short() -> None:
    long = {_name(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > FILE_LINES}
    assert long == {}


def test_functions_are_short() -> None:
    lengths = [item for path in SOURCES for item in _functions(path)]
    assert {where: lines for where, lines in lengths if lines > FUNCTION_LINES} == {}
    ordered = sorted(lines for _, lines in lengths)
    assert ordered[int(0.95 * (len(ordered) - 1))] <= FUNCTION_LINES_P95


def test_every_threat_is_held_by_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")))
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert named - set(re.findall(r"def (test_\w+)\(", source)) == set()
    assert len(named) > 20
