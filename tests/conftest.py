"""Strict settings for every test; they must be in place before JAX is first imported."""

import os
import sys
from importlib.metadata import version

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could choose its devices")

# Eight virtual CPU devices, so that every sharded path runs on a laptop. Each keeps to one thread:
# the pool has eight, and one that waits for the others' part of a sum can't lend its own. A busy
# machine may be slow to bring all eight together; XLA would abort the process after 40 seconds.
# Programs are compiled without optimisation, for most of them run a few times only.
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += (
        " --xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        " --xla_backend_optimization_level=0"
    )
    # Later ones know no other emitters, and end the process at a flag that they don't know.
    if version("jaxlib").startswith("0.10."):
        _flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = _flags.strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def lenient_promotion():
    """Lets third-party code that mixes dtypes or ranks (pgx does) run inside one test."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="session")
def _eight_devices():
    """Fails early, with the reason, where the flag above came too late."""
    if jax.device_count() != 8:
        raise RuntimeError(f"tests need 8 virtual CPU devices, found {jax.device_count()}")
