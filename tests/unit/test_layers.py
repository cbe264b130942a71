"""Imports go downward only (docs: the layers in CONTRIBUTING.md). Every import statement counts: relative
ones, those inside functions, and those under TYPE_CHECKING, except that torch may be named in annotations."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "sluice"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"nearest"}),
    frozenset({"types", "errors"}),
    frozenset({"config"}),
    frozenset({"device", "plugins", "gym"}),
    frozenset({"log", "obs"}),
    frozenset({"sandbox", "models", "data", "rewards", "algos", "weights", "checkpoint"}),
    frozenset({"rollout", "train"}),
    frozenset({"orchestrate"}),
    frozenset({"plan", "deploy", "dashboard"}),
    frozenset({"episodes", "doctor", "engines_install"}),
    frozenset({"cli"}),
    frozenset({"__init__"}),
)
"""From the bottom; a part imports itself and what is in lower layers, never a sibling of its layer."""
SIBLINGS_THAT_MEET = {("types", "errors"), ("errors", "types"), ("log", "obs"), ("obs", "log")}
ONLY: Mapping[str, frozenset[str]] = {
    "plan": frozenset({"nearest", "types", "errors", "config"}),
    "deploy": frozenset({"nearest", "types", "errors", "config"}),
    "dashboard": frozenset({"nearest", "types", "errors", "config", "log", "obs"}),
}
"""Parts that may import less than their layer says."""
NEVER = {("train", "algos"), ("rollout", "algos"), ("rollout", "data"), ("rollout", "rewards")}
WITHOUT_TORCH = frozenset({"types", "errors", "config", "log"})
PACKAGE_ROOT = "__init__"


@dataclass(frozen=True)
class Import:
    """`importer` (a module, dotted, without `sluice.`) names `target` at `line`."""

    importer: str
    target: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules(source: Path) -> dict[str, Path]:
    """Dotted names without the leading `sluice`; a package goes by its own name."""
    found: dict[str, Path] = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(source: Path) -> list[Import]:
    known = modules(source)
    return [found for name, path in known.items() for found in _imports_of(name, path, known)]


def _imports_of(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    if name == PACKAGE_ROOT:
        package = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if not node.level else ["sluice", *package[: len(package) - node.level + 1]]
            head = ".".join([*base, *([node.module] if node.module else [])])
            targets = [_submodule(head, alias.name, known) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            first = node.args[0]
            targets = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        else:
            continue
        for target in dict.fromkeys(targets):
            yield Import(name, target, node.lineno, id(node) in guarded)


def _submodule(head: str, name: str, known: Mapping[str, Path]) -> str:
    """`from sluice.log import reader` imports the module `sluice.log.reader`; other names only `sluice.log`."""
    full = f"{head}.{name}"
    is_module = full.startswith("sluice.") and full.removeprefix("sluice.") in known
    return full if is_module or full == "sluice.__version__" else head


def violations(source: Path) -> list[str]:
    everything = imports(source)
    found = [f"{one}: {fault}" for one in everything for fault in _faults(one)]
    return [*found, *_cycles(modules(source), everything)]


def _faults(one: Import) -> Iterator[str]:
    part = one.importer.split(".")[0]
    root, _, rest = one.target.partition(".")
    if root == "ray" and not one.importer.startswith("orchestrate.ray"):
        yield "only orchestrate/ray imports ray"
    if root == "torch" and part in WITHOUT_TORCH and not one.typing_only:
        yield f"{part} runs without torch"
    if root == "sluice" and rest != "__version__":
        yield from _downward(part, rest.split(".")[0] or PACKAGE_ROOT)


def _downward(part: str, target: str) -> Iterator[str]:
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    unknown = {part, target} - level.keys()
    if unknown:
        yield f"{', '.join(sorted(unknown))} is in no layer: add it to LAYERS"
    elif part == target or (part, target) in SIBLINGS_THAT_MEET:
        return
    elif target == PACKAGE_ROOT:
        yield "parts import each other's modules, from the package root only __version__"
    elif level[target] == level[part]:
        yield f"{part} and {target} are siblings"
    elif level[target] > level[part]:
        yield f"{target} lies above {part}"
    elif (part, target) in NEVER:
        yield f"{part} never imports {target}"
    elif part in ONLY and target not in ONLY[part]:
        yield f"{part} imports only {', '.join(sorted(ONLY[part]))}"


def _cycles(known: Mapping[str, Path], everything: list[Import]) -> list[str]:
    """Cycles between modules, by depth-first search. An import of a package counts as one of its `__init__`."""
    edges: dict[str, list[str]] = {name: [] for name in known}
    for one in everything:
        target = one.target.removeprefix("sluice.")
        if one.target.startswith("sluice.") and target in known and target != one.importer and not one.typing_only:
            edges[one.importer].append(target)
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append("cycle: " + " → ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())
    return found


def test_imports_go_downward() -> None:
    assert violations(SOURCE) == []


def test_the_walk_sees_the_source() -> None:
    found = imports(SOURCE)
    assert any(one.importer.startswith("cli.") and one.target == "sluice.config.load" for one in found), (
        "inside functions"
    )
    assert any(one.importer == "types" and one.target == "torch" and one.typing_only for one in found)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("data/x.py", "import sluice.rewards.y", "data and rewards are siblings"),
        ("algos/x.py", "def f():\n    from sluice.models import build", "algos and models are siblings"),
        ("weights/x.py", "from ..checkpoint import store", "weights and checkpoint are siblings"),
        ("weights/x.py", "from .. import checkpoint", "weights and checkpoint are siblings"),
        ("rollout/x.py", "from sluice.train import packing", "rollout and train are siblings"),
        ("train/x.py", "from sluice import rollout", "train and rollout are siblings"),
        ("train/backends/x.py", "from ...algos.base import y", "train never imports algos"),
        ("config/x.py", "from sluice.log import y", "log lies above config"),
        ("types.py", "from .config import run", "config lies above types"),
        (
            "config/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sluice.train import y",
            "train lies above config",
        ),
        ("deploy/x.py", "from sluice.orchestrate import y", "deploy imports only config, errors, nearest, types"),
        ("dashboard/x.py", "from sluice.train import y", "dashboard imports only"),
        ("config/x.py", "import torch.nn", "config runs without torch"),
        ("log/x.py", "def f():\n    import torch", "log runs without torch"),
        ("orchestrate/loop.py", "import ray", "only orchestrate/ray imports ray"),
        ("cli.py", "from ray import serve", "only orchestrate/ray imports ray"),
        ("helpers/x.py", "import sluice.types", "helpers is in no layer"),
        ("data/x.py", "from importlib import import_module\nimport_module('sluice.models.build')", "are siblings"),
        ("data/x.py", "from sluice import RunConfig", "from the package root only __version__"),
    ],
)
def test_planted_violations_are_caught(tmp_path: Path, file: str, text: str, fault: str) -> None:
    for name in ("config", "log", "data", "rewards", "models", "checkpoint", "rollout", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert fault in found[0]


def test_planted_cycles_are_caught(tmp_path: Path) -> None:
    package = tmp_path / "data"
    package.mkdir()
    (package / "__init__.py").write_text("from sluice.data.a import x")
    (package / "a.py").write_text("from .b import y\nx = 1")
    (package / "b.py").write_text("def f():\n    from sluice.data import c\ny = 1")
    (package / "c.py").write_text("import sluice.data.a")
    assert violations(tmp_path) == ["cycle: data.a → data.b → data.c → data.a"]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    for file, text in {
        "orchestrate/ray/x.py": "import ray",
        "orchestrate/loop.py": "from sluice.train import base\nfrom sluice.algos import base\nimport torch",
        "train/base.py": "from ..config import run\nfrom .packing import x",
        "types.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []
