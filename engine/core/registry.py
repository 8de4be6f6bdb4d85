"""Parts of a run that are chosen by name: one kind of part is one folder, one part of it is one file. A user's own part is
named by where it stands, `path/to/file.py:Name` or `package.module:Name`, and is used like one of ours.

Nothing is imported before it is asked for by name, so a registry costs nothing to those who only list names.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from engine.core.errors import ConfigError, NumericsError, SemionError

USERS = "semion_user_"  # how the modules of users' files are called, as no library is
LOADING = threading.RLock()  # one user's file is loaded at a time; it may load another
Part = TypeVar("Part")
Made = TypeVar("Made")


class Registry(Generic[Part]):
    """The parts of one kind: the files of `package` but those in `support`, each with one class that extends the base."""

    def __init__(self, option: str, package: str, base: str, support: Collection[str] = (), also: Collection[str] = ()) -> None:
        """`option`: what names a part in a configuration, for messages. `base`: "module:Class" that every part extends.
        `support`: modules of the package that are no parts. `also`: what the option may say besides, for messages."""
        self.option, self._package, self._base = option, package, base
        self._also = tuple(also)
        self._support = {*support, base.partition(":")[0].rpartition(".")[2]}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Our own parts, in alphabetical order; found without importing them."""
        spec = importlib.util.find_spec(self._package)
        assert spec is not None and spec.submodule_search_locations, self._package
        found = (module.name for module in pkgutil.iter_modules(list(spec.submodule_search_locations)))
        return tuple(sorted(name for name in found if name not in self._support and not name.startswith("_")))

    def load(self, name: str) -> type[Part]:
        """The class of a part. ConfigError when there is none of that name, or it does not extend the base."""
        base: type[Part] = load_object(self._base, self.option)
        if ":" in name:
            found = load_object(name, self.option)
            if not (isinstance(found, type) and issubclass(found, base)):
                raise ConfigError(
                    f"{self.option} must name a class that extends {self._base.replace(':', '.')}; found {name!r}, which is "
                    f"{found!r}: extend it"
                )
            return found
        if name not in self.names:
            raise ConfigError(
                f"{self.option} must be one of {', '.join((*self._also, *self.names))}, or your own as path/to/file.py:Name or "
                f"package.module:Name; found {name!r}: choose one"
            )
        module = import_module(self._module_of(name))
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, base) and value.__module__.startswith(module.__name__)
        ]
        parts = [value for value in own if not any(other is not value and issubclass(other, value) for other in own)]
        assert len(parts) == 1, f"{module.__name__} must hold one {base.__name__}; found {parts}"
        return parts[0]

    def _module_of(self, name: str) -> str:
        """The module of a part of ours: its file, or in a folder the file that is called as the kind of part is."""
        module, kind = f"{self._package}.{name}", self._base.rpartition(":")[2].lower()
        inside = f"{module}.{kind}"
        spec = importlib.util.find_spec(module)
        is_folder = spec is not None and spec.submodule_search_locations is not None
        return inside if is_folder and importlib.util.find_spec(inside) is not None else module


def identity(name: str, option: str) -> str | None:
    """What a checkpoint records of a user's own part: the SHA-256 of its file, None for one of ours. What that file imports
    is not looked at. ConfigError when there is no file of code."""
    if ":" not in name:
        return None
    digest = source_digest(name)
    if digest is None:
        raise ConfigError(f"{option} must name a file of code that exists; found none behind {name!r}: check the path")
    return digest


def source_digest(reference: str) -> str | None:
    """SHA-256 of the file of code behind a reference; None where there is none."""
    file = source_file(reference)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None


def portable(name: str) -> str:
    """A part's name as processes with another working directory understand it too: a user's file by its whole path."""
    place, colon, attribute = name.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if colon and place.endswith(".py") else name


def source_file(reference: str) -> Path | None:
    """The file of code behind `path/to/file.py:Name` or `package.module:Name`; None for a module without one, such as a
    built-in. Nothing of the user's is imported: a module is looked for as Python would, the working directory first."""
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    package, *rest = place.split(".")
    if not package:
        return None
    spec = PathFinder.find_spec(package, [os.getcwd(), *sys.path]) or importlib.util.find_spec(package)
    for part in rest:  # by its last name alone: the parents of a full one would have to be imported
        folders = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(part, list(folders)) if folders else None
    found = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return found if found is not None and found.is_file() else None


def load_object(reference: str, option: str) -> Any:
    """What `path/to/file.py:Name` or `package.module:Name` names, imported. ConfigError names `option`, rule, value and fix."""
    place, _, attribute = reference.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"{option} must read path/to/file.py:Name or package.module:Name; found {reference!r}: add the colon")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"{option} must name a file that exists; found none at {place}: check the path")
    try:
        module = module_of_file(Path(place)) if place.endswith(".py") else import_module(place)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file does while it is imported
        why = f"{type(error).__name__}: {error.msg}" if isinstance(error, SyntaxError) else repr(error)
        raise ConfigError(
            f"{option} must name a module that can be imported; found {place} with {why} ({_place_of(error)}): mend it"
        ) from error
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = ", ".join(name for name, value in vars(module).items() if _is_own(value, module)) or "nothing"
            raise ConfigError(
                f"{option} must name something of {place}; found no {attribute} there, but {there}: check the name"
            )
        found = getattr(found, part)
    return found


def load_function(reference: str, option: str, *parameters: str) -> Callable[..., Any]:
    """A user's function that is called with these arguments, by place. ConfigError when there is none that takes them."""
    found = load_object(reference, option)
    if not callable(found) or isinstance(found, type) or inspect.iscoroutinefunction(found):
        raise ConfigError(f"{option} must name an ordinary function; found {reference!r}, which is {found!r}: name one")
    try:
        inspect.signature(found).bind(*parameters)
    except TypeError as error:
        raise ConfigError(
            f"{option} must name a function of ({', '.join(parameters)}); found {reference!r}: {error}: change its parameters"
        ) from error
    return found


def called(
    reference: str,
    option: str,
    function: Callable[..., Made],
    *arguments: Any,
    error: type[SemionError] = NumericsError,
) -> Made:
    """What a user's function returns. `error` names it, with file and line, for whatever it raises."""
    try:
        return function(*arguments)
    except SemionError:
        raise
    except Exception as fault:
        raise error(
            f"{option} = {reference!r} failed with {type(fault).__name__}: {fault} ({_place_of(fault)}): mend it"
        ) from fault


def _place_of(error: BaseException) -> str:
    """File and line that raised it."""
    if isinstance(error, SyntaxError) and error.filename:  # of a file that was not run
        return f"{error.filename}, line {error.lineno}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}" if trace is not None else "nowhere"


def module_of_file(path: Path) -> ModuleType:
    """A user's file as a module, loaded once a process; what lies beside it can be imported, as when Python runs it."""
    with LOADING:
        return _module_of_file(path.resolve())


@cache
def _module_of_file(path: Path) -> ModuleType:
    folder = str(path.parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    name = f"{USERS}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # no library's name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    with _without_namesakes(path.parent) as namesakes:
        sys.modules[name] = module  # as an import does, before the code runs: dataclasses look there
        try:
            spec.loader.exec_module(module)
            _require_top_imports(path, namesakes)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextmanager
def _without_namesakes(folder: Path) -> Iterator[dict[str, Path]]:
    """While entered, a file of `folder` imports what lies beside it, also where a user's file in another folder has imported a
    module of that name, which has its own again afterwards. Gives those names with the other folders."""
    beside = {module.name for module in pkgutil.iter_modules([str(folder)])}
    loaded = sys.modules.copy()  # other threads import too
    elsewhere = {Path(str(module.__file__)).parent for name, module in loaded.items() if name.startswith(USERS)} - {folder}
    files = {name: Path(str(getattr(loaded[name], "__file__", None))) for name in beside & loaded.keys()}
    namesakes = {name: file.parent for name, file in files.items() if _lies_in(file, elsewhere)}
    taken = {name: sys.modules.pop(name) for name in loaded if name.partition(".")[0] in namesakes}
    try:
        yield namesakes
    finally:
        for name in [name for name in sys.modules.copy() if name.partition(".")[0] in namesakes]:
            del sys.modules[name]
        sys.modules.update(taken)


def _lies_in(file: Path, folders: Collection[Path]) -> bool:
    """Whether a module's file, or the folder of a package's, stands directly in one of these folders."""
    place = file.resolve()
    return (place.parent.parent if place.name == "__init__.py" else place.parent) in folders


def _require_top_imports(path: Path, namesakes: Mapping[str, Path]) -> None:
    """ConfigError where a function of a user's file imports, when it is called, a name that another user's file has imported
    from elsewhere: it would get the other one's."""
    tree = ast.parse(path.read_bytes()) if namesakes else ast.Module([], [])
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in (inner for outer in functions for inner in ast.walk(outer)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in {name.partition(".")[0] for name in names} & namesakes.keys():
            raise ConfigError(
                f"{path}, line {node.lineno}: {name} must be imported at the top of the file, since another file of yours has "
                f"imported a module of that name from {namesakes[name]}; found it inside a function: move it, or rename one"
            )


def _is_own(value: object, module: ModuleType) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
