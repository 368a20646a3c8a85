"""The wheel holds what the checkout holds, and the pins agree with the declared ranges."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.parametrize("package", ["fourfold", "jaxrl", "vicreg", "unlearn", "dialog"])
def test_wheel_holds_each_package_with_its_marker(wheel_names, package):
    assert f"{package}/__init__.py" in wheel_names
    assert f"{package}/py.typed" in wheel_names


def test_wheel_holds_nothing_else(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "fourfold",
        "jaxrl",
        "vicreg",
        "unlearn",
        "dialog",
    }


def test_wheel_holds_every_source_file(wheel_names):
    for source, package in [
        ("fourfold", "fourfold"),
        ("jaxrl", "jaxrl"),
        ("ssl/vicreg", "vicreg"),
        ("unlearn", "unlearn"),
        ("dialog", "dialog"),
    ]:
        for path in (ROOT / source).rglob("*"):
            if path.suffix in {".py", ".csv", ".css", ".json"}:
                assert f"{package}/{path.relative_to(ROOT / source).as_posix()}" in wheel_names


def test_constraints_are_exact_pins_without_addresses():
    for pin in PINS:
        assert pin.url is None
        assert [s.operator for s in pin.specifier] == ["=="], str(pin)


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_every_declared_dependency_is_pinned_within_its_range(version):
    environment = {**default_environment(), "python_version": version, "extra": ""}
    pinned = {
        canonical(pin.name): next(iter(pin.specifier)).version
        for pin in PINS
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    extras = PROJECT["optional-dependencies"]
    # Accelerator plug-ins follow jax's own pin.
    declared = PROJECT["dependencies"] + [
        line for name, lines in extras.items() if name not in {"gpu", "tpu"} for line in lines
    ]
    for line in declared:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            continue
        name = canonical(requirement.name)
        assert name in pinned, f"{line} has no pin on Python {version}"
        assert pinned[name] in requirement.specifier, f"{line} against {name}=={pinned[name]}"


def test_scripts_resolve():
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        file = Path(*module.split(".")).with_suffix(".py")
        source = next(root / file for root in (ROOT, ROOT / "ssl") if (root / file).is_file())
        assert re.search(rf"^def {function}\(", source.read_text(encoding="utf-8"), re.MULTILINE)
