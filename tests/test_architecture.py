"""The house's dependency rules, and what importing costs. Each guard is shown able to fail."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "crossent"

# A part imports from itself and from parts before it.
LAYERS = (
    {"problem"},
    {"backends"},
    {"functional"},
    {"patching"},
    {"head"},
    {"modules", "pages"},
    {"learn", "report", "testing"},
    {"integrations", "cli"},
    {"__main__", "__init__"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
THIRD_PARTY = {
    "report.row_stats": {"torch", "numpy"},
    "report.explanation": {"torch", "pandas", "matplotlib", "rich"},
    "report.tables": {"torch", "pandas"},
    "report.html": {"pandas", "matplotlib"},
    "pages.html": {"jinja2"},
    "integrations.fastai": {"torch", "fastai"},
    "integrations.torchmetrics": {"torch", "torchmetrics"},
    "problem.arrays": {"torch", "numpy"},
    "integrations.sklearn": {"torch", "sklearn"},
    "integrations.labels": {"torch", "numpy"},
    "report.text": {"rich", "pandas"},
    "report.plot": {"matplotlib"},
    "report.files": {"torch", "numpy", "pandas", "safetensors"},
    "learn.rendering": {"torch", "rich"},
    "cli": {"torch", "click", "rich"},
    "testing": {"torch", "mpmath"},
}
TYPES_ONLY = {"typing_extensions"}


def part_of(module: str) -> str:
    return module.split(".")[0]


def imports(text: str, module: str) -> tuple[set[str], set[str]]:
    """The modules of ours and the third parties that a module's text imports."""
    base = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1]
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:  # "from ..backends import cpu" names a module
                inner = f"{source}.{alias.name}".removeprefix(".")
                ours.add(inner if inner in KNOWN or not source else source)
    return ours, others - set(sys.stdlib_module_names) - TYPES_ONLY


def violations(text: str, module: str) -> set[str]:
    ours, others = imports(text, module)
    rank = RANK[part_of(module)]
    above = {name for name in ours if RANK[part_of(name)] > rank}
    beside = {name for name in ours if RANK[part_of(name)] == rank}
    beside = {name for name in beside if part_of(name) != part_of(module)}
    return above | beside | (others - THIRD_PARTY.get(module, {"torch"}))


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = path
    return found


KNOWN = set(modules())
PACKAGES = {name for name, path in modules().items() if path.stem == "__init__"} - {"__init__"}


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
        if name != "problem.torch_internals":
            found = private_names(path.read_text())
            assert not found, (name, found)
    assert private_names("import torch\nx = torch._C._functorch")
    assert private_names("from torch._C import _functorch")


def test_every_part_has_a_layer():
    assert {part_of(name) for name in modules()} == set(RANK)
    assert len(list(SOURCE.glob("*.py"))) <= 10


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_one_way(module):
    assert violations(modules()[module].read_text(), module) == set()


def test_what_is_allowed_is_used():
    used = {name: imports(path.read_text(), name) for name, path in modules().items()}
    for layer, below in zip(LAYERS[1:], LAYERS, strict=False):
        parts = {part_of(o) for name in used if part_of(name) in layer for o in used[name][0]}
        assert parts & below, (layer, below)
    for module, allowed in THIRD_PARTY.items():
        assert allowed <= used[module][1], (module, allowed - used[module][1])


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("problem.rows", "from ..functional import cross_entropy", "functional"),
        ("problem.rows", "from .. import functional", "functional"),
        ("problem.rows", "from ..backends import cpu", "backends.cpu"),
        ("backends.reference", "from ..functional import x", "functional"),
        ("backends", "from ..functional import x", "functional"),
        ("report", "from ..learn.steps import x", "learn.steps"),
        ("learn.calculus", "import numpy as np", "numpy"),
        ("backends.reduction", "from rich.table import Table", "rich"),
        ("functional", "def f():\n    from .cli import main", "cli"),
        ("backends.results", "import crossent.cli", "crossent"),
    ],
)
def test_the_import_rule_can_fail(module, line, found):
    assert violations(line, module) == {found}


def test_modules_do_not_import_each_other_in_circles():
    graph = {}
    for name, path in modules().items():
        statements = ast.parse(path.read_text()).body
        at_once = [n for n in statements if isinstance(n, ast.Import | ast.ImportFrom)]
        graph[name] = imports("\n".join(map(ast.unparse, at_once)), name)[0] - {name}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


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
        "             'integrations.sklearn.log_loss', 'testing.budget'):\n"
        "    found = crossent\n"
        "    for name in part.split('.'):\n"
        "        found = getattr(found, name)\n"
        "print('testing' in dir(crossent), 'fastai' in dir(crossent.integrations))\n"
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
        assert len(path.read_text().splitlines()) <= 300, path
    for path in TESTS.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def test_library_raises_and_never_asserts():
    for path in SOURCE.rglob("*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not found, path


KERNELS = SOURCE.parent.parent / "csrc"


def cpp_functions(text: str) -> list[tuple[str, int]]:
    """The functions of a C++ file: what stands before the brace, and lines of the body."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    text = re.sub(r"(?m)^\s*#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m.group().count("\n"), text)
    found, open_braces, begin = [], [], 0
    for place, character in enumerate(text):
        if character == "{":
            head = " ".join(text[begin:place].split())
            scope = re.search(r"\b(namespace|struct|class|union|enum|extern)\b", head)
            outside = all(kind == "scope" for kind, *_ in open_braces)
            kind = "scope" if scope and "(" not in head else "function" if outside else "block"
            open_braces.append((kind, head, place))
        elif character == "}" and open_braces:
            kind, head, opened = open_braces.pop()
            if kind == "function" and "(" in head:
                found.append((head, text.count("\n", opened, place) + 1))
        if character in "{};":
            begin = place + 1
    return found


def test_functions_of_the_kernels_fit_on_a_page():
    lengths = {
        f"{path.name}: {head[-60:]}": lines
        for path in [*KERNELS.glob("*.h"), *KERNELS.glob("*.cpp")]
        for head, lines in cpp_functions(path.read_text())
    }
    assert len(lengths) > 50
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}
    assert cpp_functions("namespace a {\nint f(int x) {\n  return x;\n}\n}") == [
        ("int f(int x)", 3)
    ]


def test_the_kernels_mathematics_knows_nothing_of_torch():
    bridge = {"tensors.h", "torch_bridge.h", "memory.h", "memory.cpp", "row_outputs.h"}
    bridges = bridge | {path.name for path in KERNELS.glob("*_ops.cpp")}
    users = {
        path.name
        for path in [*KERNELS.glob("*.h"), *KERNELS.glob("*.cpp")]
        if re.search(r'#include [<"](torch|ATen|c10)/', path.read_text())
        or any(f'#include "{header}"' in path.read_text() for header in bridge)
    }
    assert bridge <= users
    assert users <= bridges


def test_functions_fit_on_a_page():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                assert node.end_lineno - first.lineno < 60, (path, node.name)
