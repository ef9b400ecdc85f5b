"""The house's dependency rules, and what importing costs. Each guard is shown able to fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "crossent"

# Which modules of ours a module may import. Lower floors know nothing of higher ones.
FLOOR = {"options", "torch_internals", "rows", "arithmetic"}
CHECKS = {"warn", "targets"}
ALLOWED = {
    "torch_internals": set(),
    "options": {"torch_internals"},
    "arrays": set(),
    "overrides": {"rows"},
    "rows": set(),
    "arithmetic": set(),
    "derivatives": {"torch_internals"},
    "warn": {"torch_internals"},
    "targets": {"arrays", "options", "warn"},
    "problem": FLOOR | CHECKS,
    "eligibility": {"problem", "torch_internals"},
    "reduction": {"arithmetic", "torch_internals"},
    "calculus": FLOOR | {"targets"},
    "ops": set(),
    "backends.graphs": {"backends.reference", "derivatives", "ops", "options", "problem",
                        "torch_internals"},
    "backends": {"backends.reference", "backends.graphs", "backends.cpu", "backends.small",
                 "derivatives", "problem", "rows", "torch_internals"},
    "backends.cpu": {"derivatives", "eligibility", "ops", "problem", "rows", "torch_internals"},
    "backends.small": {"backends.cpu", "derivatives", "ops", "torch_internals"},
    "backends.reference": {"arithmetic", "derivatives", "problem", "rows"},
    "functional": FLOOR | CHECKS | {"backends", "overrides", "problem", "reduction"},
    "chunks": {"options"},
    "thinning": {"ops"},
    "rowwise": {"backends", "derivatives", "problem", "rows", "thinning", "torch_internals"},
    "head": {"arithmetic", "targets", "torch_internals"},
    "sweep": {"backends", "chunks", "head", "rowwise", "thinning", "torch_internals"},
    "fused": {"arithmetic", "chunks", "derivatives", "head", "rowwise", "sweep",
              "torch_internals"},
    "sweep_op": {"arithmetic", "backends.graphs", "chunks", "fused", "head", "options", "problem",
                 "rowwise", "sweep", "torch_internals"},
    "linear": {"backends", "chunks", "derivatives", "eligibility", "functional", "fused", "head",
               "options", "overrides", "problem", "reduction", "rows", "rowwise", "sweep",
               "sweep_op", "thinning"},
    "linear_rows": {"backends", "chunks", "derivatives", "eligibility", "functional", "fused",
                    "head", "options", "overrides", "problem", "rowwise", "sweep"},
    "modules": {"functional", "linear", "options"},
    "patching": {"functional", "options", "reduction"},
    "lazy": {"functional", "linear", "linear_rows", "patching", "torch_internals"},
    "integrations": set(),
    "integrations.fastai": {"calculus", "report", "modules"},
    "integrations.torchmetrics": {"arrays", "backends", "report.calibration", "functional",
                                  "options", "problem"},
    "metrics": {"arrays", "functional", "warn"},
    "integrations.huggingface": {"functional", "lazy", "patching"},
    "learn.steps": {"functional", "calculus", "learn.steps_view"},
    "learn.steps_view": {"pages", "learn.steps"},
    "learn.note": {"learn.steps"},
    "learn": set(),
    "report": {"report.diagnose", "report.explanation", "report.measure", "report.tables",
                "warn"},
    "report.measure": {"arrays", "backends", "functional", "targets"},
    "report.calibration": {"functional", "report.measure"},
    "report.diagnose": {"functional", "report.calibration", "report.measure"},
    "report.tables": {"report.measure"},
    "report.explanation": {"report.calibration", "report.diagnose", "report.measure",
                            "report.page", "report.plot", "report.tables", "report.terminal"},
    "report.page": {"report.explanation", "report.plot", "report.terminal", "pages"},
    "pages": set(),
    "learn.playground": {"pages"},
    "report.terminal": {"report.explanation"},
    "report.plot": {"report.explanation"},
    "data": {"arrays"},
    "testing": set(),
    "cli": {"data", "functional", "learn.note", "learn.playground", "learn.steps_view", "options",
            "report", "report.terminal", "testing"},
    "__main__": {"cli"},
    "__init__": {"backends", "calculus", "report", "functional", "linear", "linear_rows",
                 "modules", "patching", "learn.playground", "rows", "learn.steps", "warn"},
}  # fmt: skip
THIRD_PARTY = {
    "report.measure": {"torch", "numpy"},
    "report.explanation": {"torch", "pandas", "matplotlib", "rich"},
    "report.tables": {"torch", "pandas"},
    "report.page": {"pandas", "matplotlib"},
    "pages": {"jinja2"},
    "integrations.fastai": {"torch", "fastai"},
    "integrations.torchmetrics": {"torch", "torchmetrics"},
    "arrays": {"torch", "numpy"},
    "metrics": {"torch", "numpy", "sklearn"},
    "report.terminal": {"rich", "pandas"},
    "report.plot": {"matplotlib"},
    "data": {"torch", "numpy", "pandas", "safetensors"},
    "learn.steps_view": {"torch", "rich"},
    "cli": {"torch", "click", "rich"},
    "testing": {"torch", "mpmath"},
}
PACKAGES = {"backends", "report", "integrations", "learn"}
TYPES_ONLY = {"typing_extensions"}


def imports(text: str, module: str) -> tuple[set[str], set[str]]:
    """The modules of ours and the third parties that a module's text imports."""
    package = module.split(".")[:-1]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if module in PACKAGES:
                base = [module] if node.level == 1 else []
            if node.module:
                ours.add(".".join([*base, node.module]))
            else:
                ours |= {".".join([*base, alias.name]) for alias in node.names}
    return ours, others - set(sys.stdlib_module_names) - TYPES_ONLY


def violations(text: str, module: str) -> set[str]:
    ours, others = imports(text, module)
    return (ours - ALLOWED[module]) | (others - THIRD_PARTY.get(module, {"torch"}))


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = path
    return found


# The one name that has no public form: how a tensor without memory is made.
PRIVATE_ELSEWHERE = {"lazy": {"_make_wrapper_subclass"}}


def private_names(text: str) -> set[str]:
    """Names of torch that begin with an underscore, as imports or as attributes."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {n for n in names if n.startswith("_")}
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ("torch", "Tensor", "forward_ad"):
                found.add(node.attr)
    return {n for n in found if not n.startswith("__")}


def test_private_names_of_torch_stand_in_one_module():
    for name, path in modules().items():
        if name != "torch_internals":
            found = private_names(path.read_text()) - PRIVATE_ELSEWHERE.get(name, set())
            assert not found, (name, found)
    assert private_names("import torch\nx = torch._C._functorch")
    assert private_names("from torch._C import _functorch")


def test_every_module_has_a_rule():
    assert set(modules()) == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_point_one_way(module):
    assert violations(modules()[module].read_text(), module) == set()


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("problem", "from .functional import cross_entropy", "functional"),
        ("problem", "from . import functional", "functional"),
        ("backends.reference", "from . import cpu", "backends.cpu"),
        ("backends.reference", "from ..functional import x", "functional"),
        ("backends", "from ..functional import x", "functional"),
        ("calculus", "import numpy as np", "numpy"),
        ("reduction", "from rich.table import Table", "rich"),
        ("functional", "def f():\n    from .cli import main", "cli"),
        ("rows", "import crossent.cli", "crossent"),
    ],
)
def test_the_import_rule_can_fail(module, line, found):
    assert violations(line, module) == {found}


def test_allowed_imports_have_no_cycle_but_the_lazy_view():
    graph = {k: set(v) for k, v in ALLOWED.items()}
    # Imported when printed or drawn, not when imported.
    graph["learn.steps"].discard("learn.steps_view")
    graph["report.explanation"] -= {"report.terminal", "report.plot", "report.page"}
    while graph:
        leaves = {m for m, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {m: needs for m, needs in graph.items() if m not in leaves}


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HEAVY = "triton matplotlib rich fastai transformers pandas sklearn click jinja2 mpmath".split()
LOADED = "import sys, torch; before = set(sys.modules); import {extra}; import crossent;" \
    "print(*{{m.split('.')[0] for m in set(sys.modules) - before}})"  # fmt: skip


def test_import_loads_nothing_heavy():
    loaded = set(in_fresh_process(LOADED.format(extra="sys")).split())
    assert not loaded & {*HEAVY, "numpy"}
    assert "crossent" in loaded


def test_the_import_guard_can_fail():
    assert "rich" in in_fresh_process(LOADED.format(extra="rich")).split()


def test_works_where_optional_packages_are_missing():
    code = (
        "import sys\n"
        f"for name in {HEAVY}: sys.modules[name] = None\n"
        "import torch, crossent\n"
        "x = torch.tensor([[20.0, 0.0]], requires_grad=True)\n"
        "crossent.cross_entropy(x, torch.tensor([0])).backward()\n"
        "print(f'{x.grad[0, 0].item():.4e}')"
    )
    assert in_fresh_process(code) == "-2.0612e-09"


def test_what_the_readme_writes_works_after_import_crossent():
    code = (
        "import crossent\n"
        "for part in ('integrations.huggingface.compute_loss', 'integrations.fastai.explain',\n"
        "             'integrations.torchmetrics.Perplexity',\n"
        "             'metrics.log_loss', 'lazy.LazyLinear', 'testing.budget'):\n"
        "    found = crossent\n"
        "    for name in part.split('.'):\n"
        "        found = getattr(found, name)\n"
        "print('lazy' in dir(crossent), 'fastai' in dir(crossent.integrations))\n"
        "for missing in (crossent, crossent.integrations):\n"
        "    print(hasattr(missing, 'no_such_part'))"
    )
    assert in_fresh_process(code).split() == ["True", "True", "False", "False"]


def test_no_module_is_shadowed_by_a_function_of_its_name():
    code = (
        "import crossent, importlib, pkgutil, types\n"
        "for module in pkgutil.iter_modules(crossent.__path__):\n"
        "    found = getattr(crossent, module.name, None)\n"
        "    if found is not None and not isinstance(found, types.ModuleType):\n"
        "        print(module.name)"
    )
    assert in_fresh_process(code) == ""


def test_source_files_fit_in_the_head():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_library_raises_and_never_asserts():
    for path in SOURCE.rglob("*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not found, path
