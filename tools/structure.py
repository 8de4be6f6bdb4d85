"""Counts the structure of engine/: packages, levels, imports between packages, circles, loose files, imports inside functions.
A package here is a folder of engine/ or a file directly in it; an arrow is at least one import from one package to another,
also inside functions. Circles of files are of what runs: an import under TYPE_CHECKING loads nothing.

    python tools/structure.py [CHECKOUT]
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path


def imported(tree: ast.AST, modules: set[str], *, types: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it; those that it names in types alone, if `types`."""
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in guarded and not types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "engine":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Those that import themselves by way of others."""
    return sorted(name for name in edges if name in reached(name, edges))


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """Whatever `start` imports, and what that imports."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = edges.get(waiting.pop(), set()) - seen
        seen |= fresh
        waiting += fresh
    return seen


def level(package: str, edges: dict[str, set[str]], known: dict[str, int]) -> int:
    """One above the highest package that it imports."""
    if package not in known:
        known[package] = 0
        known[package] = 1 + max((level(other, edges, known) for other in edges[package]), default=0)
    return known[package]


def figures(root: Path) -> dict[str, object]:
    """The counts of one checkout."""
    engine = root / "engine"
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(engine.rglob("*.py"))}
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in trees}
    modules = set(names.values())
    files = {names[path]: set(imported(tree, modules)) - {names[path]} for path, tree in trees.items()}
    run = {names[path]: set(imported(tree, modules, types=False)) - {names[path]} for path, tree in trees.items()}
    package_of = {module: module.split(".")[1] if "." in module else "" for module in modules}
    packages: dict[str, set[str]] = {package: set() for package in package_of.values() if package}
    for module, targets in files.items():
        if package_of[module]:
            packages[package_of[module]] |= {package_of[target] for target in targets} - {package_of[module], ""}
    known: dict[str, int] = {}
    inside = sum(
        isinstance(node, (ast.Import, ast.ImportFrom))
        for tree in trees.values()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    )
    loose = sorted(path.name for path in engine.glob("*.py") if path.stem not in ("__init__", "__main__", "cli"))
    return {
        "packages": len(packages),
        "levels": max(level(package, packages, known) for package in packages),
        "arrows between packages": sum(map(len, packages.values())),
        "loose files beside cli.py": len(loose),
        "packages in a circle": circles(packages),
        "files in a circle": circles(run),
        "imports inside functions": inside,
        "files": len(trees),
        "lines": sum(len(path.read_text("utf-8").splitlines()) for path in trees),
    }


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1] if len(sys.argv) > 1 else ".")), indent=1))
