"""Importing does nothing: no array, no device query, no file, no setting; and needs no extra."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "fourfold": ROOT / "fourfold",
    "jaxrl": ROOT / "jaxrl",
    "vicreg": ROOT / "ssl" / "vicreg",
    "unlearn": ROOT / "unlearn",
    "dialog": ROOT / "dialog",
}
# Programs, which own their process; never at import.
MAY_CONFIGURE_JAX = "fourfold.runtime.mesh fourfold.claims.* fourfold.cli *.cli"

# Calls that only wrap or register a function or a class, and so do no work at import.
WRAPPERS = (
    "jax.jit jax.vmap jax.grad jax.value_and_grad jax.checkpoint jax.remat jax.custom_vjp "
    "jax.custom_jvp jax.named_call jax.shard_map jax.ShapeDtypeStruct jax.sharding.PartitionSpec "
    "jax.tree_util.register_*"
)
FILE_ACCESS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "loadtxt", "mkdir"}


def among(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def evaluated_at_import(nodes: list[ast.stmt]) -> Iterator[ast.expr]:
    """Expressions that run when the module is imported: not the bodies of functions."""
    for node in nodes:
        if isinstance(node, ast.If) and any(
            name in ast.unparse(node.test) for name in ("TYPE_CHECKING", "__name__")
        ):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from node.decorator_list
            yield from (d for d in node.args.defaults + node.args.kw_defaults if d is not None)
            continue
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield child
        for field in ("body", "orelse", "finalbody"):
            yield from evaluated_at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from evaluated_at_import(handler.body)
        if isinstance(node, ast.With | ast.ClassDef):
            yield from (item.context_expr for item in getattr(node, "items", []))


def calls(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls(child)


def work_violations(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    tree = ast.parse(source)
    alias = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                alias[a.asname or a.name.split(".")[0]] = (
                    a.name if a.asname else a.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            alias.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})

    def dotted(node: ast.expr) -> str:
        head, _, rest = ast.unparse(node).partition(".")
        return ".".join(filter(None, [alias.get(head, head), rest]))

    for expression in evaluated_at_import(tree.body):
        for call in calls(expression):
            name, where = dotted(call.func), f"{module}:{call.lineno}"
            if within(name, "jax") and not among(name, WRAPPERS):
                yield f"{where} calls {name} at import"
            if name.split(".")[-1] in FILE_ACCESS:
                yield f"{where} touches files at import: {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "jax.config.update":
            if not among(module, MAY_CONFIGURE_JAX):
                yield f"{module}:{node.lineno} calls jax.config.update, which is the caller's to do"


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
def test_nothing_happens_at_import(module):
    path, is_package = MODULES[module]
    assert list(work_violations(module, path.read_text(encoding="utf-8"), is_package)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import jax.numpy as jnp\nEPS = jnp.float32(1e-5)", "jax.numpy.float32"),
        ("import jax\nN = 2 * len(jax.devices())", "jax.devices"),
        ("import jax\nclass A:\n    key = jax.random.key(0)", "jax.random.key"),
        ("from jax import numpy as np\ndef f(x=np.zeros(3)): ...", "jax.numpy.zeros"),
        ("import jax\nif True:\n    jax.config.update('a', 1)", "jax.config.update"),
        ("import jax\ndef f():\n    jax.config.update('a', 1)", "jax.config.update"),
        ("TEXT = open('a').read()", "touches files"),
        ("from pathlib import Path\nTEXT = Path('a').read_text()", "touches files"),
    ],
)
def test_a_work_rule_fires(source, message):
    assert any(message in found for found in work_violations("jaxrl.losses", source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxrl.agent", "import jax\nf = jax.jit(lambda x: jax.numpy.ones(3))"),
        ("jaxrl.agent", "import jax\n@jax.jit\ndef f(x):\n    return jax.numpy.ones(3)"),
        ("jaxrl.cli", "import jax\ndef main():\n    jax.config.update('jax_x', 1)"),
    ],
)
def test_good_code_passes(module, source):
    assert list(work_violations(module, source)) == []


def run(code: str, **env: str) -> str:
    """Runs code at the repository root, in a process that has no platform for JAX to find."""
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=ROOT,
        env={
            "PATH": "",
            "PYTHONPATH": "ssl",
            "HOME": "/nonexistent",
            "JAX_PLATFORMS": "none",
            **env,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


EXTRAS = (
    "envpool pgx imageio_ffmpeg tensorflow_datasets grain mlxtend sklearn jax_privacy "
    "dp_accounting transformers tokenizers safetensors huggingface_hub tensorboardX wandb torch"
).split()
BLOCK = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it raises ImportError
"""


def test_every_module_imports_without_extras_and_without_a_device():
    names = [name for name in MODULES if not name.endswith("__main__")]
    run(BLOCK + f"import importlib\nfor name in {names}: importlib.import_module(name)")


def test_losses_cost_only_jax_and_numpy():
    loaded = run(BLOCK + "import jaxrl.losses\nprint(*{m.split('.')[0] for m in sys.modules})")
    heavy = {"flax", "optax", "orbax", "tyro", "rich", "matplotlib"}
    assert {"jax", "numpy"} <= set(loaded.split())
    assert not heavy & set(loaded.split())
