"""The shape of the repository: what must be where, and what must never appear."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fourfold", "jaxrl", "ssl/vicreg", "unlearn", "dialog")
MAX_LINES = 350
SKIPPED = {".venv", ".git", "reports", "runs", "build", "dist", "__pycache__"}


def project_files() -> list[Path]:
    """Files under version control or about to be; all files where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not SKIPPED & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file())


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None  # A picture or another binary.


def test_ssl_is_no_package():
    assert not (ROOT / "ssl" / "__init__.py").exists(), "ssl/README.md says why"


def test_standard_library_wins_at_the_root():
    """With the root and ssl/ first on the path, as a shell, a script and an editor set it."""
    code = (
        "import ssl, asyncio, urllib.request, vicreg\n"
        "assert ssl.create_default_context() is not None\n"
        "print(ssl.__file__)\nprint(vicreg.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ssl")])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found, vicreg = (Path(line).resolve() for line in result.stdout.split("\n")[:2])
    # The interpreter itself may live in .venv, so the repository alone proves nothing.
    assert ROOT / "ssl" not in found.parents and ROOT != found.parent
    assert vicreg == ROOT / "ssl" / "vicreg" / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed_and_documented(package):
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_no_init_under_tests():
    assert [p for p in (ROOT / "tests").rglob("__init__.py")] == []


def test_tests_import_no_helpers():
    """What they share lives in conftest.py: their folders are no packages. A worker is run."""
    stray = [
        str(p.relative_to(ROOT))
        for p in (ROOT / "tests").rglob("*.py")
        if not (p.name.startswith("test_") or p.name.endswith(("_worker.py", "conftest.py")))
    ]
    assert stray == []


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in project_files()
        if path.suffix == ".py" and ROOT / "tests" not in path.parents
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines; split by idea: {long}"


# Split in two, so that this file does not match itself.
FORBIDDEN = {
    "absolute home path": re.compile(r"/(?:ro" r"ot|ho" r"me|Us" r"ers)/[\w.]"),
    "package registry host": re.compile(
        r"pypi\.o" r"rg|pythonhosted\.o" r"rg|download\.pytorch\.o" r"rg|registry\.npmjs\.o" r"rg"
    ),
    "merge conflict": re.compile(r"^(?:<{7} |>{7} )", re.MULTILINE),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_mentions(what):
    hits = []
    for path in project_files():
        text = text_of(path)
        if text is not None and (match := FORBIDDEN[what].search(text)):
            hits.append(f"{path.relative_to(ROOT)}: {match.group()!r}")
    assert not hits, f"{what}: {hits}"


@pytest.mark.parametrize(
    ("what", "bad"),
    [
        ("absolute home path", "/ho" + "me/someone/data"),
        ("absolute home path", "/ro" + "ot/.cache"),
        ("package registry host", "https://py" + "pi.org/simple"),
        ("merge conflict", "a\n" + "<" * 7 + " HEAD\nb"),
    ],
)
def test_the_pattern_fires(what, bad):
    assert FORBIDDEN[what].search(bad)
    assert not FORBIDDEN[what].search("a home / root path < > of py.typed")


def test_links_in_documents_resolve():
    broken = []
    for path in project_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
                if "://" not in target and not (path.parent / target).exists():
                    broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken
