"""The floors of the package and its two seams, read from the imports.

Every module stands on a floor and imports only from floors below, at the top of the file, as `from
functional_hess.tree import Space`. Trees are flattened in one module and derivatives taken in one other, so that
there is a single place to look for each. Nothing is imported to find this out: the sources are parsed, and each
checker is shown to object to the sources it is there for.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "functional_hess"

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "tree",
        "patterns",
        "affine",
        "nesting",
        *(f"repaired_{kind}" for kind in ("losses", "places", "sampling", "singular")),
    ),
    tuple(f"repaired_{kind}" for kind in ("distances", "gathers", "matrices", "norms", "refusals", "sequences")),
    ("repairs", "differences", "coloring", "index_sets", "captures", "overwriting"),
    ("levels", "connections", "structure"),
    ("guards", "transcripts"),
    ("transforms", "impurity", "extrapolation"),
    ("jacobians", "chunking", "prepared", "modules", "resuming"),
    ("verification",),
    ("products",),
    ("risk", "sites", "taylor", "sparsity", "rows"),
    ("independence", "compressed", "contraction"),
    ("seeding", "tasks"),
    ("elimination",),
    ("lifting", "blocks", "colored", "plans", "vector_valued"),
    ("second_order", "explanation", "per_sample", "sparse"),
    ("operators",),
    ("curvature", "solvers", "krylov"),
    ("stochastic", "implicit"),
    ("meta", "optimize", "distributed"),
    ("testing", "plots"),
    ("report",),
    ("__main__",),
    ("__init__",),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# What an extra brings is imported where it is needed, so that the core does without.
EXTRAS = {"matplotlib", "scipy", "sklearn", "tqdm"}

# What only a few modules may touch, by import or by attribute. torch.vmap is torch.func.vmap under another name. `levels`
# differentiates; `nesting` reads the stack of levels and the wrappers of tensors.
SEAMS = {
    "optree": ("tree",),
    "torch.func": ("levels",),
    "torch.autograd": ("levels", "nesting"),
    "torch.vmap": ("levels",),
    "torch._functorch": ("levels",),
    "torch._C._functorch": ("nesting",),
    "functorch": ("levels",),
}

FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "base", "types", "_src"}

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "functional_hess",
    "notebooks",
    "pyproject.toml",
    "tests",
}


def sources() -> dict[str, str]:
    """Every module of the package by its dotted name below the package, with its text."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(ROOT / PACKAGE).with_suffix("").parts): file.read_text() for file in files}


# Checkers: a module's name and source in, sentences out ---------------------------------------------------------------


def placement(module: str, source: str) -> list[str]:
    """The module is in the table, and its name says what it holds."""
    parts = set(module.split("."))
    return [
        *(f"{module}: '{name}' says nothing about what is inside" for name in sorted(parts & FORBIDDEN_NAMES)),
        *([] if module in FLOOR else [f"{module}: not in the table of floors"]),
    ]


def contract(module: str, source: str) -> list[str]:
    """A docstring, and an `__all__` that is a plain list of names that exist."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else [f"{module}: no docstring"]
    public = [node.value for node in tree.body if isinstance(node, ast.Assign) and _targets(node) == ["__all__"]]
    if len(public) != 1:
        return [*faults, f"{module}: {len(public)} assignments to __all__, expected one"]
    try:
        names = ast.literal_eval(public[0])
    except ValueError:
        return [*faults, f"{module}: __all__ is not a plain list of names"]
    bound = set(_bound_names(tree.body))
    return faults + [f"{module}: __all__ names {name}, which is not there" for name in names if name not in bound]


def imports(module: str, source: str) -> list[str]:
    """Imports of the package's own modules go strictly down, at the top of the file, in one form."""
    tree, faults = ast.parse(source), []
    top = set(map(id, tree.body))

    def fault(node: ast.AST, text: str) -> None:
        faults.append(f"{module}:{node.lineno}: {text}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    fault(node, f"import {alias.name}: write from {PACKAGE}.module import Name")
        elif isinstance(node, ast.ImportFrom):
            origin = (node.module or "").split(".")
            if node.level:
                fault(node, "a relative import")
            elif origin[0] == PACKAGE:
                if id(node) not in top:
                    fault(node, f"from {node.module} import ... stands inside something, not at the top of the file")
                if any(alias.name == "*" for alias in node.names):
                    fault(node, "import *")
                if len(origin) == 1:
                    if module != "__init__" or any(alias.name not in FLOOR for alias in node.names):
                        fault(node, "an import from the package's root")
                elif origin[1] not in FLOOR or len(origin) > 2:
                    fault(node, f"{node.module} is not in the table of floors")
                elif module in FLOOR and FLOOR[origin[1]] >= FLOOR[module]:
                    floors = f"floor {FLOOR[origin[1]]} from floor {FLOOR[module]}"
                    fault(node, f"{origin[1]} is not below {module} ({floors})")
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            fault(node, "an import by name, which nobody can read")
    return faults


def lateness(module: str, source: str) -> list[str]:
    """Extras are imported inside functions; everything else is imported outside."""
    tree, faults = ast.parse(source), []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(inner) for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        for name in _imported(node):
            extra = name.split(".")[0] in EXTRAS
            if id(node) in inside and not extra:
                faults.append(f"{module}:{node.lineno}: {name} is imported inside a function")
            if id(node) not in inside and extra:
                faults.append(f"{module}:{node.lineno}: {name} is an extra and must be imported where it is used")
    return faults


def seams(module: str, source: str) -> list[str]:
    """Only `tree` touches optree, and only `levels` and `nesting` touch the machinery of derivatives."""
    tree, touched = ast.parse(source), []
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        touched += [(node.lineno, name) for name in _imported(node)]
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
            names |= {a.name.split(".")[0]: a.name.split(".")[0] for a in node.names if not a.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        dotted = _dotted(node, names)
        if dotted:
            touched.append((node.lineno, dotted))
    faults = {
        f"{module}:{line}: {seam} may be touched only by {' and '.join(f'{owner}.py' for owner in owners)}"
        for line, name in touched
        for seam, owners in SEAMS.items()
        if module not in owners and f"{name}.".startswith(f"{seam}.")
    }
    return sorted(faults)


def roof(source: str) -> list[str]:
    """`__init__` holds a docstring, imports of names from the package's modules, and `__all__`."""
    faults = []
    for k, node in enumerate(ast.parse(source).body):
        is_docstring = k == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_import = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        is_all = isinstance(node, ast.Assign) and _targets(node) == ["__all__"]
        if not (is_docstring or is_import or is_all):
            faults.append(f"__init__:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return faults


def top_level(names: Iterable[str]) -> list[str]:
    """Nothing lies at the top of the repository but what is meant to."""
    return [f"{name} does not belong at the top of the repository" for name in sorted(set(names) - TOP_LEVEL)]


# Reading a syntax tree ------------------------------------------------------------------------------------------------


def _imported(node: ast.AST) -> list[str]:
    """The dotted names an import statement brings in: `from torch import func` brings torch.func."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """`t.func.grad` as torch.func.grad where t is torch, and getattr(t, "func") as torch.func."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else None
    if isinstance(node, ast.Call) and _last_name(node.func) == "getattr" and len(node.args) >= 2:
        inner, attribute = _dotted(node.args[0], names), node.args[1]
        if inner and isinstance(attribute, ast.Constant):
            return f"{inner}.{attribute.value}"
    return None


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _bound_names(body: Iterable[ast.stmt]) -> Iterable[str]:
    """Names that statements bind at module level, inside `if`, `try` and `with` too."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name))
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _bound_names(getattr(node, field, []))


# The package ----------------------------------------------------------------------------------------------------------

each_module = pytest.mark.parametrize(("module", "source"), sources().items(), ids=sources())


@each_module
@pytest.mark.parametrize("checker", [placement, contract, imports, lateness, seams])
def test_module_keeps_to_its_floor(checker, module, source):
    assert checker(module, source) == []


def test_package_holds_the_modules_it_is_made_of():
    assert {"__init__", "tree", "nesting", "levels", "transforms"} <= set(sources())


def test_roof_holds_names_only():
    assert roof(sources()["__init__"]) == []


def test_top_level_of_the_repository_is_tidy():
    assert top_level(tracked_names() or visible_names()) == []


def tracked_names() -> set[str]:
    """First components of the tracked files; empty where there is no repository, or no git."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {path.split("/")[0] for path in listing.stdout.split("\0") if path}


def visible_names() -> set[str]:
    """What lies there, less hidden and made things."""
    made = {"build", "dist", "venv", "htmlcov", "__pycache__", f"{PACKAGE}.egg-info"}
    return {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made


# Each checker objects to what it is there for -------------------------------------------------------------------------

CONTRACT = '"""A docstring."""\n\n__all__ = ["f"]\n\n\ndef f(): ...\n'


@pytest.mark.parametrize(
    ("checker", "module", "source", "complaint"),
    [
        (placement, "utils", "", "says nothing"),
        (placement, "_src.tree", "", "says nothing"),
        (placement, "novelty", "", "not in the table"),
        (contract, "tree", '__all__ = ["f"]\ndef f(): ...', "no docstring"),
        (contract, "tree", '"""A docstring."""', "0 assignments to __all__"),
        (contract, "tree", '"""A docstring."""\n__all__ = list(globals())', "not a plain list"),
        (contract, "tree", '"""A docstring."""\n__all__ = ["f"]\ndef g(): ...', "names f, which is not there"),
        (imports, "tree", "from functional_hess.transforms import grad", "not below"),
        (imports, "guards", "from functional_hess.chunking import chunks", "not below"),
        (imports, "tree", "from functional_hess.tree import Space", "not below"),
        (imports, "products", "from functional_hess import Space", "root"),
        (imports, "products", "from functional_hess import tree", "root"),
        (imports, "__init__", "from functional_hess import Space", "root"),
        (imports, "products", "import functional_hess", "write from"),
        (imports, "products", "import functional_hess.tree as tree", "write from"),
        (imports, "products", "from .tree import Space", "relative"),
        (imports, "products", "from . import tree", "relative"),
        (imports, "products", "from functional_hess.tree import *", "import *"),
        (imports, "products", "from functional_hess.tree.space import Space", "not in the table"),
        (imports, "products", "from functional_hess.novelty import f", "not in the table"),
        (imports, "products", "def f():\n    from functional_hess.tree import Space", "not at the top"),
        (imports, "products", "class A:\n    from functional_hess.tree import Space", "not at the top"),
        (imports, "products", "if True:\n    from functional_hess.tree import Space", "not at the top"),
        (imports, "products", "import importlib\nimportlib.import_module('functional_hess.report')", "by name"),
        (imports, "products", "__import__('functional_hess.report')", "by name"),
        (lateness, "plots", "import matplotlib.pyplot as plt", "is an extra"),
        (lateness, "plots", "try:\n    from matplotlib import pyplot\nexcept ImportError:\n    pass", "is an extra"),
        (lateness, "plots", "def f():\n    import json", "inside a function"),
        (lateness, "plots", "def f():\n    class A:\n        from os import path", "inside a function"),
        (seams, "products", "import optree", "only by tree.py"),
        (seams, "products", "from optree import tree_map", "only by tree.py"),
        (seams, "products", "import optree.pytree as pytree", "only by tree.py"),
        (seams, "products", "import torch.func", "only by levels.py"),
        (seams, "products", "from torch import func", "only by levels.py"),
        (seams, "products", "from torch.func import grad", "only by levels.py"),
        (seams, "products", "import torch\ntorch.func.grad", "only by levels.py"),
        (seams, "products", "import torch as t\ng = t.autograd.grad", "only by levels.py"),
        (seams, "products", "def f():\n    import torch as t\n    return t.autograd", "only by levels.py"),
        (seams, "products", "import torch\n@torch.vmap\ndef f(): ...", "only by levels.py"),
        (seams, "products", "import torch\ngetattr(torch, 'func').grad", "only by levels.py"),
        (seams, "products", "from torch import _C\n_C._functorch.maybe_current_level()", "only by nesting.py"),
        (seams, "products", "from torch._C import _functorch", "only by nesting.py"),
        (seams, "products", "import torch._functorch.config", "only by levels.py"),
        (seams, "products", "import functorch", "only by levels.py"),
        (seams, "levels", "from torch._C import _functorch", "only by nesting.py"),
        (seams, "nesting", "import torch.func", "only by levels.py"),
        (seams, "transforms", "import optree", "only by tree.py"),
        (seams, "transforms", "import torch\ntorch.func.grad", "only by levels.py"),
        (seams, "tree", "import torch\ntorch.func.grad", "only by levels.py"),
    ],
)
def test_checker_objects(checker, module, source, complaint):
    assert any(complaint in fault for fault in checker(module, source))


@pytest.mark.parametrize(
    ("checker", "module", "source"),
    [
        (placement, "tree", ""),
        (contract, "tree", CONTRACT),
        (contract, "tree", '"""A docstring."""\n__all__ = ["A", "B"]\nA = 1\nif A:\n    B: int = 2'),
        (imports, "products", "import torch\nfrom functional_hess.tree import Space\nfrom torch import Tensor"),
        (imports, "__init__", "from functional_hess import solvers\nfrom functional_hess.tree import Space"),
        (imports, "products", "from functional_hessian import f"),
        (lateness, "plots", "import json\n\n\ndef f():\n    import matplotlib.pyplot as plt"),
        (seams, "tree", "import optree\nfrom optree import tree_map"),
        (seams, "levels", "import torch\nfrom torch.func import grad\ntorch.autograd.grad"),
        (seams, "nesting", "from torch._C import _functorch\nfrom torch.autograd import forward_ad"),
        (seams, "products", "import torch\ntorch.function\ntorch.nn.functional.softplus"),
        (seams, "products", "from torch.overrides import TorchFunctionMode\nimport torch._subclasses"),
        (seams, "products", "def f(torch):\n    return self.func.autograd"),
    ],
)
def test_checker_has_no_objection(checker, module, source):
    assert checker(module, source) == []


@pytest.mark.parametrize("source", ["x = 1", "import torch", "def f(): ...", "from torch import Tensor", "1", "f()"])
def test_roof_of_more_than_names_is_noticed(source):
    assert len(roof(f'"""A docstring."""\n{source}\n__all__ = []')) == 1


def test_stray_file_is_noticed():
    assert top_level(["README.md", "notes.txt"]) == ["notes.txt does not belong at the top of the repository"]


def test_floors_name_every_module_once():
    assert len(FLOOR) == sum(map(len, FLOORS)) and FLOOR["tree"] == 0 and FLOOR["__init__"] == max(FLOOR.values())
