"""What makes tests of whole Atari runs take seconds."""

import subprocess

import jax
import pytest


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compiled_once(_cache_folder, monkeypatch):
    """Compiles each program once a session, and in subprocesses too, instead of once a run."""
    from jax.experimental.compilation_cache import compilation_cache

    names = {"jax_compilation_cache_dir": str(_cache_folder)}
    names["jax_persistent_cache_min_compile_time_secs"] = 0.1
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        monkeypatch.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def small_net(monkeypatch):
    """One coarse convolution and 16 hidden units in place of the Nature CNN."""
    from jaxrl import networks

    def net(actions, atoms, **options):
        return networks.ConvNet(actions, atoms, ((4, 12, 12),), (16,), 1 / 255, **options)

    monkeypatch.setattr(networks, "nature_net", net)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, where the machine allows to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
