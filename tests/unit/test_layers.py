"""The shape of the house: imports point one way, heavy libraries stay in their packages, and every file keeps the rules
(one opening paragraph, no broad except, no guarded import, no global, nothing evaluated or unpickled). Long files and functions
are places to look, not faults: pytest warns of them.
"""

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "engine"

# From the ground up. A package (a folder or a module of engine/) imports its own layer and those above it in this list.
LAYERS = (
    ("core",),
    ("config",),
    ("ops", "models", "observe"),
    ("algorithms", "bridge", "data"),
    ("capacity",),
    ("inference", "megatron", "rewards"),
    ("rollouts", "evaluation", "benchmarks"),
    ("run",),
    ("forecast",),
    ("api",),
    ("commands", "cli", "__main__"),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

# Library -> the only places under engine/ that may import it, at the top of a file or inside a function.
HEAVY = {
    "ray": ("run/processes.py", "run/handles.py", "run/nodes.py", "run/watch.py"),
    "vllm": ("inference/",),
    "megatron": ("megatron/",),
    "transformer_engine": ("megatron/",),
    "apex": ("megatron/",),
    "amp_C": ("megatron/",),
    "math_verify": ("rewards/",),
    "transformers": ("data/", "inference/"),
    "datasets": ("data/",),
    "tensorboard": ("observe/sinks/tensorboard.py",),
    "wandb": ("observe/sinks/wandb.py",),
    "mlflow": ("observe/sinks/mlflow.py",),
    "alpaca_eval": ("benchmarks/win_rate.py",),
}

# Functions that may take any error and answer with its words: vLLM loses the other workers' answers when one of them raises.
ANSWERING = {"semion_receive", "semion_quantized"}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "torch.load"}
BROAD = {"Exception", "BaseException"}
GUARDS = {"ImportError", "ModuleNotFoundError", *BROAD}


def sources() -> dict[str, ast.Module]:
    """Every Python file of engine/, by its path below it."""
    return {str(path.relative_to(ENGINE)): ast.parse(path.read_text("utf-8")) for path in sorted(ENGINE.rglob("*.py"))}


SOURCES = sources()
BELOW_THE_TOP = [path for path in SOURCES if path != "__init__.py"]


def package_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, wherever in it; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def packages_imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, name in imported(tree):
        package, _, rest = name.partition(".")
        if package == "engine" and rest:
            yield line, rest.split(".")[0]


def faults(tree: ast.Module) -> list[str]:
    """Where a file leaves the rules of the house, one phrase each."""
    found = []
    if tree.body and ast.get_docstring(tree) is None:
        found.append("no opening paragraph")
    answering = {handler for function in ast.walk(tree) if answers(function) for handler in ast.walk(function)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            found.append(f"line {line}: global {', '.join(node.names)}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(f"line {line}: {ast.unparse(node.func)}(...)")
        elif isinstance(node, ast.Try):
            guards = any(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in node.body)
            if guards and any(caught(handler) & GUARDS for handler in node.handlers):
                found.append(f"line {line}: guarded import")
        elif isinstance(node, ast.ExceptHandler):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if caught(node) & BROAD and not raises and node not in answering:
                found.append(f"line {line}: broad except that does not raise")
    return found


def places_to_look(tree: ast.Module, num_lines: int) -> list[str]:
    """Where a file is long, one phrase each."""
    found = [f"{num_lines} lines (over {MAX_FILE_LINES})"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"line {node.lineno}: {node.name} has {length} lines (over {MAX_FUNCTION_LINES})")
    return found


def answers(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in ANSWERING


def caught(handler: ast.ExceptHandler) -> set[str]:
    """Names of the exceptions a handler takes; a bare one takes BaseException."""
    if handler.type is None:
        return {"BaseException"}
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path", BELOW_THE_TOP)
def test_every_package_has_a_layer_and_imports_only_downwards(path):
    package = package_of(path)
    assert package in LEVEL, f"engine/{path}: package {package!r} is in no layer: give it one in LAYERS"
    for line, target in packages_imported(SOURCES[path]):
        assert target in LEVEL, f"engine/{path}:{line} imports engine.{target}, which is in no layer"
        assert LEVEL[target] <= LEVEL[package], f"engine/{path}:{line} imports upwards: {package} -> {target}"


def test_packages_of_one_layer_do_not_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {package: set() for package in LEVEL}
    for path in BELOW_THE_TOP:
        edges[package_of(path)] |= {target for _, target in packages_imported(SOURCES[path])} - {package_of(path)}
    while leaves := [package for package, targets in edges.items() if not targets & edges.keys()]:
        for package in leaves:
            del edges[package]
    assert not edges, f"a circle among {sorted(edges)}"


@pytest.mark.parametrize("path", BELOW_THE_TOP)
def test_heavy_libraries_stay_in_their_packages(path):
    for line, name in imported(SOURCES[path]):
        homes = HEAVY.get(name.split(".")[0])
        assert homes is None or path.startswith(homes), f"engine/{path}:{line} imports {name}; its place is {homes}"


@pytest.mark.parametrize("path", SOURCES)
def test_rules_of_the_house(path):
    num_lines = len((ENGINE / path).read_text("utf-8").splitlines())
    for place in places_to_look(SOURCES[path], num_lines):
        warnings.warn(f"engine/{path}: {place}", stacklevel=1)
    assert faults(SOURCES[path]) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1", "no opening paragraph"),
        ("'''Room.'''\ndef f():\n    global x", "global x"),
        ("'''Room.'''\neval('1')", "eval(...)"),
        ("'''Room.'''\nimport torch\ntorch.load('x')", "torch.load(...)"),
        ("'''Room.'''\ntry:\n    import ray\nexcept ImportError:\n    ray = None", "guarded import"),
        ("'''Room.'''\ntry:\n    f()\nexcept (KeyError, Exception):\n    pass", "broad except"),
        ("'''Room.'''\ntry:\n    f()\nexcept:\n    pass", "broad except"),
    ],
)
def test_each_rule_finds_what_it_forbids(source, fault):
    (found,) = faults(ast.parse(source))
    assert fault in found


def test_long_files_and_functions_are_noticed():
    assert places_to_look(ast.parse("def f():\n" + "    x = 1\n" * 60), 61) == ["line 1: f has 61 lines (over 60)"]
    assert places_to_look(ast.parse(""), 401) == ["401 lines (over 400)"]


def test_the_rules_leave_good_code_alone():
    good = "'''Room.'''\ntry:\n    f()\nexcept Exception as error:\n    raise ValueError from error"
    assert faults(ast.parse(good)) == []
    answering = "'''Room.'''\ndef semion_receive():\n    try:\n        f()\n    except Exception:\n        return 'why'"
    assert faults(ast.parse(answering)) == []


def modules_after(*names: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after importing `names`."""
    code = f"import sys\nimport {', '.join(names)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_configuration_and_observation_need_no_torch():
    """So that `semion check`, a refused option and --help answer within a second or so."""
    config = ("engine.config.load", "engine.config.schedules.registry")
    names = ("engine.cli", *config, "engine.observe.writing", "engine.observe.progress", "engine.observe.sinks.registry")
    assert not modules_after(*names) & {"torch", *HEAVY}


def test_the_two_lowest_layers_drag_in_no_trainer_generator_or_cluster():
    low = ["engine." + path.removesuffix(".py").replace("/", ".") for path in BELOW_THE_TOP if LEVEL[package_of(path)] < 2]
    loaded = modules_after(*(name.removesuffix(".__init__") for name in low))
    assert not loaded & {"megatron", "vllm", "ray", "transformer_engine"}
