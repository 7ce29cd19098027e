"""Each layer imports only lower layers, and each library is imported by one layer. Read from the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import pytest

from dist_train.config.plugins import load_plugin
from dist_train.config.sections import LoggerSettings

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dist_train"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("outcome", "reproducible", "start_up"),
    ("config",),
    ("rundir",),
    ("models", "cluster"),
    ("optim", "data", "monitoring"),
    ("checkpoint", "watch"),
    ("training", "sweep"),
    ("analysis",),
    ("launching", "report"),
    ("api",),
    ("diagnostics",),
    ("cli",),
)
"""From the bottom to the top. A layer may import those of every row below its own, and of its own row only itself."""
BELOW = {
    layer: {name for lower in LAYERS[:row] for name in lower} for row, layers in enumerate(LAYERS) for layer in layers
}

OWNERS = {
    "horovod": {"cluster"},
    "mpi4py": {"cluster"},
    "msgspec": {"monitoring", "rundir"},
    "prometheus_client": {"monitoring"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "optuna": {"sweep"},
    "scipy": {"analysis", "report"},
    "triton": {"kernels"},
}
_ASKS_WHAT_IS_INSTALLED = {"launching"}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.fixture(scope="module")
def nodes() -> Mapping[Path, Sequence[ast.AST]]:
    """The nodes of each file's syntax tree, of which the first is the module."""
    return {path: list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}


@pytest.fixture(scope="module")
def imported(nodes: Mapping[Path, Sequence[ast.AST]]) -> Mapping[Path, frozenset[str]]:
    """The dotted name of every module that a file imports, at its head or within a function."""
    return {
        path: frozenset(name for node in found for name in _imported_by(node, path)) for path, found in nodes.items()
    }


def _imported_by(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}: a relative import"
        assert node.module is not None
        yield node.module
        if node.module == "dist_train":
            yield from (f"dist_train.{name.name}" for name in node.names)


def ours(imported: Iterable[str]) -> set[str]:
    """Return the layers of the modules `imported`."""
    names = (name.split(".") for name in imported)
    return {parts[1] for parts in names if parts[0] == "dist_train" and len(parts) > 1} - {"__version__"}


def test_a_layer_knows_only_layers_below_it(imported: Mapping[Path, frozenset[str]]) -> None:
    upwards = {}
    for path in FILES:
        layer = layer_of(path)
        allowed = set(BELOW) if layer in ("__init__", "__main__") else BELOW[layer] | {layer}
        if beyond := ours(imported[path]) - allowed:
            upwards[str(path.relative_to(ROOT))] = beyond
    assert not upwards


def named(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the layers that code names in a text as in `"dist_train.models.vgg:vgg"`."""
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    found = {match[1] for text in texts for match in re.finditer(r"\bdist_train\.([a-z_]+)[.:][a-z_]", text)}
    return found & set(BELOW)


def test_a_layer_names_no_layer_above_it_in_a_text_either(nodes: Mapping[Path, Sequence[ast.AST]]) -> None:
    files = [path for path in FILES if layer_of(path) in BELOW]
    upwards = {
        str(path): beyond for path in files if (beyond := named(nodes[path]) - BELOW[layer_of(path)] - {layer_of(path)})
    }
    assert not upwards


def test_what_comes_with_the_package_and_is_found_as_plugins_are_is_there() -> None:
    table = tomllib.loads((PACKAGE / "plugins.toml").read_text(encoding="utf-8"))
    for names in table.values():
        assert all(callable(load_plugin(place)) for place in names.values())
    assert tuple(table["loggers"]) == get_args(get_args(LoggerSettings.model_fields["name"].annotation)[0])


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_known_to_its_layer_alone(library: str, imported: Mapping[Path, frozenset[str]]) -> None:
    layers = {
        layer_of(path)
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imported[path])
    }
    assert layers
    assert layers - _ASKS_WHAT_IS_INSTALLED <= OWNERS[library]


def test_no_layer_stands_outside_of_this_table() -> None:
    layers = {layer_of(path) for path in FILES} - {"__init__", "__main__"}
    assert layers <= set(BELOW)


def test_a_file_has_at_most_500_lines() -> None:
    assert not [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 500]


def test_a_public_method_has_a_docstring_unless_a_base_of_ours_has_one(
    nodes: Mapping[Path, Sequence[ast.AST]],
) -> None:
    trees = [found[0] for found in nodes.values()]
    classes = {node.name: node for found in nodes.values() for node in found if isinstance(node, ast.ClassDef)}

    def explained(cls: ast.ClassDef) -> set[str]:
        bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in cls.bases}
        own = {method.name for method in methods(cls) if ast.get_docstring(method)}
        return own.union(*(explained(classes[name]) for name in bases & set(classes)))

    public = [node for tree in trees for node in ast.iter_child_nodes(tree) if isinstance(node, ast.ClassDef)]
    public = [node for node in public if node.name[0] != "_"]
    missing = [
        (cls.name, {each.name for each in methods(cls) if each.name[0] != "_"} - explained(cls)) for cls in public
    ]
    assert not [each for each in missing if each[1]]


def methods(cls: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


WITHOUT_TORCH = (
    "dist_train",
    "dist_train.cli.main",
    "dist_train.cluster.launch",
    "dist_train.config",
    "dist_train.outcome",
    "dist_train.sweep.sweep",
    "dist_train.__main__",
)


def test_torch_and_horovod_are_imported_by_the_command_that_needs_them() -> None:
    script = f"import sys, {', '.join(WITHOUT_TORCH)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    slow = {"torch", "torchvision", "numpy", "horovod", "mpi4py", "matplotlib", "scipy", "prometheus_client"}
    assert not slow & set(loaded.stdout.split())


def test_torchvision_and_torch_s_compiler_are_imported_by_what_needs_them() -> None:
    script = """
import sys, torch
import dist_train.models
from dist_train.config import OptimizerSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.optimizers import build_optimizer, optimizer_step
for name in ("sgd", "adam", "adamw"):
    weights = FlatWeights(torch.nn.Linear(3, 2))
    optimizer = build_optimizer(OptimizerSettings(name=name), weights)
    optimizer.load_state_dict(optimizer.state_dict())
    weights.gradients.fill_(1.0)
    optimizer_step(optimizer, weights)
print(*{"torchvision", "torch._dynamo"}.intersection(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.split() == []


def test_the_program_reads_no_global_generator(
    nodes: Mapping[Path, Sequence[ast.AST]], imported: Mapping[Path, frozenset[str]]
) -> None:
    drawing = {"manual_seed", "seed", "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
    drawing |= {"rand_like", "randn_like", "randint_like"}
    # the one seeds and restores the global ones, the other has a generator for each draw
    assert {path.name for path, names in imported.items() if "random" in names} == {"reproducible.py", "study_file.py"}
    for path, found in nodes.items():
        for node in found:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_numpy = re.match(r"(np|numpy)\.random\.", ast.unparse(node.func))
            assert not of_numpy or path.name == "reproducible.py", f"{path.relative_to(ROOT)}:{node.lineno}"
            from_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            in_place = node.func.attr in {"uniform_", "normal_", "random_", "bernoulli_", "exponential_"}
            if (from_torch and node.func.attr in drawing) or in_place:
                assert any(keyword.arg == "generator" for keyword in node.keywords), (
                    f"{path.relative_to(ROOT)}:{node.lineno} draws from the global generator"
                )
