"""Who may import whom, read from the syntax tree; each rule is shown to fire on a bad snippet.

A new file needs a place in LAYERS. A rule that is in the way may be changed here, in the open.
"""

import ast
import fnmatch
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "fourfold": ROOT / "fourfold",
    "jaxrl": ROOT / "jaxrl",
    "vicreg": ROOT / "ssl" / "vicreg",
    "unlearn": ROOT / "unlearn",
    "dialog": ROOT / "dialog",
}
PARTS = set(SOURCES) - {"fourfold"}

# Inside a part, a module imports its own layer and those to its left, and never in a circle.
TOP = [
    "train train_* compiled health classify evaluate evaluate_* load plots compare watch panel "
    "film probe programs trainer store run examine oracles generator "
    "lock requests sqlite_file ledger ledger_view certificate estimator chat serve",
    "cli",
]
LAYERS = {
    "jaxrl": [
        "types",
        "config config_io presets",
        "categorical losses spectral schedulers networks envs minatar_env "
        "replay device_replay windows scores",
        "agent",
        "loop fused fused_*",
        *TOP,
    ],
    "vicreg": [
        "types",
        "config",
        "explicit losses covariance baselines models torch_weights augment resample color "
        "data source image_folder tfds_source optim knn diagnostics heads",
        "learner step accumulate monitor presets",
        *TOP,
    ],
    "unlearn": [
        "types",
        "config",
        "losses partition newton certified convex gaussian solvers sensitivity records residual "
        "planner privacy findings lira audit membership",
        "data",
        "sisa models adaptive",
        *TOP,
    ],
    "dialog": [
        "types",
        "config",
        "losses lora tokenizer tokens conversation data models.* decoding.* memory.*",
        "step prefill",
        *TOP,
    ],
}
# The layer from which on mesh, Orbax, logging and command lines are at home.
EDGE = TOP[0]

# The mathematics; what each may import beside the standard library, `types` and one another.
PURE_IMPORTS = {"jax", "numpy", "chex"}
PURE = {
    "jaxrl.losses": set(),
    "jaxrl.categorical": set(),
    "jaxrl.spectral": set(),
    "jaxrl.schedulers": {"optax"},  # they are gradient transformations
    "vicreg.config": set(),
    "vicreg.explicit": set(),
    "vicreg.losses": set(),
    "vicreg.covariance": set(),
    "vicreg.baselines": set(),
    "vicreg.augment": set(),
    "vicreg.resample": set(),
    "vicreg.color": set(),
    "vicreg.knn": set(),
    "vicreg.diagnostics": set(),
    "unlearn.losses": set(),
    "dialog.config": set(),
    "dialog.losses": set(),
    "dialog.decoding.*": set(),
    "dialog.memory.retrieve": set(),
}

# Optional extras: which modules may import them, and only inside a function.
HOMES = {
    "envpool": "jaxrl.envs",
    "pgx": "jaxrl.minatar_env",
    "imageio_ffmpeg": "jaxrl.film",
    "tensorflow_datasets": "vicreg.tfds_source unlearn.data",
    "grain": "*.data",
    "mlxtend": "*.data",
    "PIL": "vicreg.source unlearn.data jaxrl.film jaxrl.panel",
    "sklearn": "unlearn.* *.data",
    "pyarrow": "unlearn.data",
    "jax_privacy": "unlearn.privacy",
    "dp_accounting": "unlearn.privacy",
    "tokenizers": "dialog.tokens",
    "safetensors": "dialog.models.safetensors_folder",
    "huggingface_hub": "dialog.models.convert",
    "gguf": "dialog.models.gguf_weights",
    "transformers": "",  # nowhere: they are what we are compared with
    "torch": "",
    "tensorboardX": "fourfold.runtime.metrics",
    "wandb": "fourfold.runtime.metrics",
}
# Of the standard library, so not lazy.
ALSO_AT_HOME = {"sqlite3": "unlearn.sqlite_file dialog.memory.store"}
EDGE_ONLY = (
    "fourfold.runtime",
    "orbax",
    "rich",
    "logging",
    "jax.sharding",
    "jax.experimental.mesh_utils",
)
# Dataclasses, JSON and whole files; nothing of devices.
DATA_ONLY = ("fourfold.runtime.config_io", "fourfold.runtime.host_arrays")


def among(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


class Import(NamedTuple):
    target: str  # dotted; for `from a import b` this is a.b, since b may be a module
    line: int
    lazy: bool  # inside a function, or for the type checker alone


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.Module, module: str, is_package: bool = False) -> list[Import]:
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or is_type_checking(node)
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # In a package's __init__, the first dot is the package itself.
                keep = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*keep, base] if base else keep)
            found.extend(Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(tree, False)
    return found


def layer(module: str) -> int | None:
    part, _, name = module.partition(".")
    for index, names in enumerate(LAYERS[part]):
        if among(name, names):
            return index
    return None


def owner(target: str, part: str, names: set[str]) -> str | None:
    """The module of `part` that an import reaches: `jaxrl.losses.c51_loss` → `jaxrl.losses`."""
    while within(target, part) and target != part:
        if target in names:
            return target
        target = target.rpartition(".")[0]
    return None


def import_violations(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    part = module.split(".")[0]
    at = None if part == "fourfold" or is_package else layer(module)
    edge = LAYERS[part].index(EDGE) if part in PARTS else 0
    pure_extra = next((extra for pattern, extra in PURE.items() if among(module, pattern)), None)
    if part in PARTS and not is_package and at is None:
        yield f"{module} has no place in LAYERS of tests/test_import_rules.py"
    for target, line, lazy in imports(ast.parse(source), module, is_package):
        where, top = f"{module}:{line} imports {target}", target.split(".")[0]
        if part in PARTS:
            if top in PARTS - {part}:
                yield f"{where}: parts never import each other"
            if top == "fourfold" and not within(target, "fourfold.runtime"):
                yield f"{where}: of fourfold, parts may import the runtime alone"
            at_edge = any(within(target, name) for name in EDGE_ONLY)
            is_data = any(within(target, name) for name in DATA_ONLY)
            if at is not None and at < edge and at_edge and not is_data:
                yield f"{where}: at home in train and above"
            if top == "tyro" and not among(module, "*.cli *.config"):
                yield f"{where}: at home in cli and config"
            if top == part and at is not None:
                parent = target.rpartition(".")[0]
                levels = [layer(name) for name in (target, parent) if "." in name]
                level = next((found for found in levels if found is not None), None)
                if level is not None and level > at:
                    yield f"{where}: a higher layer"
        elif within(module, "fourfold.runtime"):
            if top in PARTS or (top == "fourfold" and not within(target, "fourfold.runtime")):
                yield f"{where}: the runtime is below the parts and knows none of them"
        if pure_extra is not None:
            allowed = PURE_IMPORTS | pure_extra | set(sys.stdlib_module_names)
            siblings = " ".join([f"{part}.types", *(name for name in PURE if within(name, part))])
            names = f"{target} {target.rpartition('.')[0]}".split()
            if top not in allowed and not any(among(name, siblings) for name in names):
                yield f"{where}: a pure module"
        for package, homes in (HOMES | ALSO_AT_HOME).items():
            if within(target, package):
                if not among(module, homes):
                    yield f"{where}: only in {homes}"
                if not lazy and package in HOMES:
                    yield f"{where}: optional, so inside the function that needs it"


def modules() -> dict[str, tuple[Path, bool]]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            names = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = names[-1] == "__init__"
            found[".".join(names[:-1] if is_package else names)] = (path, is_package)
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module):
    path, is_package = MODULES[module]
    assert list(import_violations(module, path.read_text(encoding="utf-8"), is_package)) == []


@pytest.mark.parametrize("part", SOURCES)
def test_no_circles(part):
    names, graph = set(MODULES), {}
    for module, (path, is_package) in MODULES.items():
        if within(module, part):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            reached = {owner(i.target, part, names) for i in imports(tree, module, is_package)}
            graph[module] = reached - {None, module}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("jaxrl.train", "import vicreg", "each other"),
        ("jaxrl.train", "def f():\n    from unlearn import sisa", "each other"),
        ("vicreg.train", "from fourfold.report import page", "runtime alone"),
        ("vicreg.train", "from fourfold import cli", "runtime alone"),
        ("jaxrl.losses", "from jaxrl.agent import act", "higher layer"),
        ("jaxrl.losses", "from . import agent", "higher layer"),
        ("jaxrl.agent", "from .train import main", "higher layer"),
        ("dialog.memory.retrieve", "from ..step import step", "higher layer"),
        ("jaxrl.helpers", "", "no place in LAYERS"),
        ("jaxrl.losses", "import flax", "pure"),
        ("jaxrl.losses", "import optax", "pure"),
        ("jaxrl.spectral", "from jaxrl import networks", "pure"),
        ("dialog.decoding.beam", "import matplotlib.pyplot as plt", "pure"),
        ("jaxrl.loop", "def f():\n    import envpool", "only in jaxrl.envs"),
        ("jaxrl.envs", "import envpool", "inside the function"),
        (
            "jaxrl.minatar_env",
            "try:\n    import pgx\nexcept ImportError:\n    pgx = None",
            "inside the",
        ),
        ("dialog.chat", "import sqlite3", "only in unlearn.sqlite_file"),
        ("jaxrl.agent", "from fourfold.runtime import mesh", "train and above"),
        ("jaxrl.loop", "from jax.sharding import Mesh", "train and above"),
        ("jaxrl.loop", "import orbax.checkpoint as ocp", "train and above"),
        ("jaxrl.train", "import tyro", "cli and config"),
        ("fourfold.runtime.mesh", "import jaxrl", "below the parts"),
        ("fourfold.runtime.mesh", "from fourfold import report", "below the parts"),
    ],
)
def test_an_import_rule_fires(module, source, message):
    assert any(message in found for found in import_violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxrl.losses", "import functools\nimport jax\nfrom jaxrl.types import Transition"),
        ("jaxrl.schedulers", "import optax"),
        ("jaxrl.losses", "from jaxrl.categorical import support"),
        ("dialog.decoding.beam", "from dialog.decoding import cache"),
        ("jaxrl.envs", "def make():\n    import envpool"),
        ("jaxrl.agent", "from jaxrl import losses, networks\nfrom . import spectral"),
        ("jaxrl.train", "from fourfold.runtime import mesh\nfrom jaxrl.loop import run"),
        (
            "jaxrl.minatar_env",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pgx",
        ),
        ("fourfold.claims.one", "from jaxrl import fused"),
    ],
)
def test_good_code_passes(module, source):
    assert list(import_violations(module, source)) == []
