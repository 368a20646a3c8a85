"""What a result was measured on, in words and numbers that a reader can compare."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return round(pages / 2**30, 1)


def cores() -> int:
    """How many cores this process may use."""
    # What this process may use, which in a container is less than what the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_options() -> dict[str, str] | None:
    """Returns compiler options that make convolutions use all cores on XLA-CPU, else None.

    By default XLA-CPU (jaxlib 0.10) runs each convolution on one thread; asking for any of the
    YNN library's fusions brings the others in, and halves the time of an update on two cores.
    """
    import jax

    if jax.default_backend() != "cpu":
        return None
    fusions = ("LIBRARY_FUSION_TYPE_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
    options = {"xla_cpu_experimental_ynn_fusion_type": ",".join(fusions)}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:  # the option is experimental: a jaxlib without it just runs slower
        return None
    return options


def hardware() -> dict[str, str | int | float | None]:
    """Describes this process's machine and devices.

    Returns:
      `cpu` (model), `cores` (usable), `memory_gib` (None where unknown), `python`, `jax`
      (version), `platform` (cpu, gpu, tpu), `device` (kind), `devices` (of all processes),
      `processes`.
    """
    import jax

    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }
