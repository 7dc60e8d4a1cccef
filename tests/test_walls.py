"""The architecture, checked on the syntax tree of every module: imports, layers and printing.

An import inside a function, or one for annotations only, counts like any other. Each rule is also run on
a planted breach, so that none of them is blind.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TORCH = (
    "mmbeam.ops",
    "mmbeam.models",
    "mmbeam.stages",
    "mmbeam.features.dataset",
    "mmbeam.training",
    "pipelines.train_shipped",
)
WALLS = {  # the only packages and modules that may import a library
    "apache_beam": ("mmbeam.transforms", "mmbeam.jobs", "pipelines"),
    "torch": TORCH,
    "transformers": TORCH,
}
FLOORS = (  # a part imports from the floors above its own line in this list, and from itself
    ("names", "errors"),
    ("terminal", "types", "config"),
    ("clean", "process", "corpus"),
    ("prompts", "decode", "ops"),
    ("readers",),
    ("runs", "models"),
    ("features",),
    ("report",),
    ("stages", "metrics"),
    ("training", "transforms"),
    ("jobs", "api"),
    ("mmbeam", "demo"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
MAX_CHAIN = 10  # modules, each of which imports the next
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
SLOW_TO_IMPORT = {"torch", "transformers", "apache_beam", "pyarrow"}


@dataclass(frozen=True)
class Module:
    name: str  # dotted
    tree: ast.Module

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """Every name that is imported, dotted, with its line."""
        return [name for node in ast.walk(self.tree) for name in _imported(node)]

    @property
    def part(self) -> str:
        """The floor's own name for it: `io` of mmbeam.readers.tar, `mmbeam` of the package itself."""
        return _part(self.name)


def _imported(node: ast.AST) -> Iterator[tuple[str, int]]:
    match node:
        case ast.Import(names=names):
            yield from ((alias.name, node.lineno) for alias in names)
        case ast.ImportFrom(module=str(module), names=names, level=0):
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in names)
        case ast.ImportFrom(level=level):
            yield "." * level, node.lineno  # no relative imports here: one way to write a module's name
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name, node.lineno


def _part(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def read_modules(root: Path) -> dict[str, Module]:
    """Parse every module of mmbeam and pipelines, by dotted name."""
    modules = {}
    for path in sorted([*root.glob("mmbeam/**/*.py"), *root.glob("pipelines/**/*.py")]):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = Module(name, ast.parse(path.read_text(), path))
    return modules


def inner_imports(module: Module, modules: dict[str, Module]) -> Iterator[tuple[str, int]]:
    """The project's own modules that it imports; `from mmbeam.readers import tar` means the file mmbeam.readers.tar."""
    for name, line in module.imports:
        if _within(name, "mmbeam"):
            yield (name if name in modules else name.rpartition(".")[0] or name), line


def breached_walls(modules: dict[str, Module]) -> list[str]:
    return [
        f"{module.name}:{line} imports {name}; only {', '.join(allowed)} may"
        for module in modules.values()
        for name, line in module.imports
        for library, allowed in WALLS.items()
        if _within(name, library) and not any(_within(module.name, package) for package in allowed)
    ]


def climbs(modules: dict[str, Module]) -> list[str]:
    """Return the imports that do not go down the floors, the parts without a floor, and the relative imports."""
    breaches = []
    for module in modules.values():
        breaches += [f"{module.name}:{line} is a relative import" for name, line in module.imports if name[0] == "."]
        if not _within(module.name, "mmbeam"):
            continue
        if module.part not in FLOOR_OF:
            breaches.append(f"{module.name} is on no floor; add {module.part} to FLOORS")
            continue
        for name, line in inner_imports(module, modules):
            floor, imported_floor = FLOOR_OF[module.part], FLOOR_OF.get(_part(name), len(FLOORS))
            if imported_floor >= floor and _part(name) != module.part:
                breaches.append(f"{module.name}:{line} imports {name}, which is not below it")
    return breaches


def cycle(modules: dict[str, Module]) -> list[str]:
    """Return the modules of an import cycle; empty without a cycle."""
    graph = {name: {other for other, _ in inner_imports(module, modules)} for name, module in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def long_chains(modules: dict[str, Module]) -> list[str]:
    """Return the longest chain of imports if it exceeds MAX_CHAIN modules. The graph must have no cycle."""
    graph = {name: {other for other, _ in inner_imports(module, modules)} for name, module in modules.items()}
    chains: dict[str, list[str]] = {}
    try:
        for name in TopologicalSorter(graph).static_order():
            below = (chains.get(other, []) for other in graph.get(name, ()))
            chains[name] = [name, *max(below, key=len, default=[])]
    except CycleError:
        return []
    package = (chain for chain in chains.values() if _within(chain[0], "mmbeam"))
    longest = max(package, key=len, default=[])
    return [] if len(longest) <= MAX_CHAIN else longest


def future_annotations(modules: dict[str, Module]) -> list[str]:
    return [
        f"{module.name}:{line}"
        for module in modules.values()
        for name, line in module.imports
        if name == "__future__.annotations"
    ]


def prints(modules: dict[str, Module]) -> list[str]:
    """Return the uses of print and sys.stdout outside the command line."""
    return [
        f"{module.name}:{node.lineno}"
        for module in modules.values()
        if module.name != "mmbeam.cli"
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr == "stdout" and ast.unparse(node) == "sys.stdout")
    ]


Check = Callable[[dict[str, Module]], list[str]]
CHECKS: tuple[Check, ...] = (breached_walls, climbs, cycle, long_chains, future_annotations, prints)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    modules = read_modules(ROOT)
    assert {"mmbeam.types", "mmbeam.config", "mmbeam.corpus.scene"} <= set(modules)
    return modules


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_keeps_the_rule(check: Check, modules: dict[str, Module]) -> None:
    assert check(modules) == []


@pytest.mark.parametrize(
    ("check", "files"),
    [
        (breached_walls, {"mmbeam/readers/tar.py": "import torch.nn as nn"}),
        (breached_walls, {"mmbeam/cli.py": "def run():\n    from apache_beam import Pipeline"}),
        (breached_walls, {"mmbeam/decode.py": "import importlib\nimportlib.import_module('transformers')"}),
        (breached_walls, {"pipelines/embed.py": "import torch"}),
        (breached_walls, {"mmbeam/models/clip.py": "import apache_beam"}),
        (climbs, {"mmbeam/errors.py": "from mmbeam.config import Limits", "mmbeam/config.py": ""}),
        (climbs, {"mmbeam/decode.py": "from mmbeam.readers import tar", "mmbeam/readers/tar.py": ""}),
        (climbs, {"mmbeam/readers/tar.py": "def f():\n    from mmbeam import jobs", "mmbeam/jobs/__init__.py": ""}),
        (climbs, {"mmbeam/readers/tar.py": "from . import shards", "mmbeam/readers/shards.py": ""}),
        (climbs, {"mmbeam/somewhere.py": ""}),
        (
            cycle,
            {
                "mmbeam/readers/a.py": "from mmbeam.readers import b",
                "mmbeam/readers/b.py": "def f():\n    import mmbeam.readers.a",
            },
        ),
        (long_chains, {f"mmbeam/m{n}.py": f"import mmbeam.m{n + 1}" for n in range(11)}),
        (future_annotations, {"mmbeam/types.py": "from __future__ import annotations"}),
        (prints, {"mmbeam/readers/tar.py": "def f():\n    print(1)"}),
        (prints, {"pipelines/embed.py": "import sys\nsys.stdout.write('1')"}),
    ],
)
def test_a_forbidden_import_is_reported(check: Check, files: dict[str, str], tmp_path: Path) -> None:
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert check(read_modules(tmp_path))


def test_the_rules_let_good_code_pass(tmp_path: Path) -> None:
    (tmp_path / "mmbeam" / "models").mkdir(parents=True)
    (tmp_path / "mmbeam" / "errors.py").write_text("class Error(Exception): ...")
    (tmp_path / "mmbeam" / "cli.py").write_text("import torchlike\nfrom mmbeam.errors import Error\nprint(Error)")
    (tmp_path / "mmbeam" / "models" / "clip.py").write_text("import torch\nfrom mmbeam.errors import Error")
    assert [check(read_modules(tmp_path)) for check in CHECKS] == [[]] * len(CHECKS)


def test_the_command_line_starts_without_the_slow_imports() -> None:
    code = f"import sys, mmbeam.cli; print(sorted({SLOW_TO_IMPORT} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_page_on_architecture_names_what_exists() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    travel = page[page.index("## How a sample travels") : page.index("## Where to add")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mmbeam").rglob("*.py"))
    names = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", travel)}
    modules = {path.stem for path in (ROOT / "mmbeam").rglob("*.py")}
    missing = [name for name in names - modules if not re.search(rf"\b(def|class) {name}\b", source)]
    assert len(names) > 25
    assert missing == []
    places = re.findall(
        r"`([\w.]+(?:/|\.py))`", page[page.index("## The tree") : page.index("## How a sample travels")]
    )
    roots = (ROOT, ROOT / "mmbeam", ROOT / "mmbeam" / "models")
    assert [place for place in places if not any((root / place).exists() for root in roots)] == []
