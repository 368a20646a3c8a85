"""Pre-training: where the pure step meets devices, files and the terminal."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import jax
import numpy as np

from fourfold.runtime import mesh as meshes
from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.metrics import Metrics
from fourfold.runtime.preemption import Preemption
from fourfold.runtime.progress import Progress
from fourfold.runtime.run_dir import RunDir
from vicreg import compiled, data, plots
from vicreg import learner as learners
from vicreg.compiled import Functions
from vicreg.config import PretrainConfig
from vicreg.data import Source
from vicreg.health import CollapseError, Health, NonFiniteError
from vicreg.learner import TrainState

# What may change when a run goes on: how it is watched, and where its data lies.
FREE = (
    *("log_every", "validate_every", "checkpoint_every", "on_collapse"),
    *("data.data_dir", "evaluation"),
)


def pretrain(
    config: PretrainConfig,
    path: str | Path,
    *,
    resume: bool = False,
    num_devices: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    quiet: bool = False,
) -> TrainState:
    """Trains in a run folder, or goes on with it to the same end, bit for bit.

    Args:
      config: the configuration.
      path: the run's folder.
      resume: go on with the run in it.
      num_devices: devices to train on, over all processes; None for all.
      tensorboard: also log to TensorBoard.
      wandb: W&B project to log to, if any.
      quiet: no progress on the terminal.

    Returns:
      The state at the end, or at the moment of a SIGTERM.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a bad configuration, folder or data set;
        nothing was changed.
      NonFiniteError, CollapseError: the run is not worth going on with; the checkpoints are from
        before, and the message says which is the last.
      DiskFullError: a checkpoint didn't fit; the earlier ones are intact.
    """
    mesh = meshes.make_mesh(num_devices)
    _check_devices(config, mesh.size)
    sources = {split: open_images(config, split, quiet=quiet) for split in ("train", "test")}
    train = sources["train"]
    steps_per_epoch = len(train) // config.batch_size
    batches = data.batches(
        train,
        config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    learner = learners.make(config, steps_per_epoch, train.num_classes)
    functions = compiled.compile_functions(config, learner, mesh)
    run = RunDir.open(path, config, free=FREE) if resume else RunDir.create(path, config)
    checkpoints = Checkpoints(run.checkpoints)
    state = functions.init(jax.random.key(config.seed))
    start = checkpoints.start(resume)
    if start:
        state, extra = checkpoints.restore(start, state)
        batches.set_state(extra["batches"])
    total = config.epochs * steps_per_epoch
    every = {
        "checkpoint": config.checkpoint_every * steps_per_epoch,
        "validate": config.validate_every * steps_per_epoch,
    }
    health, kept = Health(config.loss.name), False

    options = {"start": start, "tensorboard": tensorboard, "wandb": wandb, "quiet": quiet}
    with (
        Metrics(run.path, total, config=run.saved_config(), **options) as metrics,
        Preemption() as preemption,
    ):
        alone = jax.process_count() == 1
        clock = _Clock()
        at = start
        while at < total:
            try:
                batch = clock.wait(lambda: next(batches))
            except Exception:
                if alone and not health.suspect:  # a file that can't be read must not cost work
                    _save(checkpoints, at, state, batches)
                raise
            state, line, images = functions.advance(state, batch)
            at += 1
            save = at % every["checkpoint"] == 0 or at == total
            log = at % config.log_every == 0 or at == total or save
            stop = preemption.requested if alone else log and preemption.agreed()
            if not (log or stop):
                continue
            line = jax.device_get({**line, **functions.diagnose(state, images)})
            line = {name: float(line[name]) for name in sorted(line, key=_rank)}
            line |= {"epoch": at / steps_per_epoch, **clock.lap(at - start, config.batch_size)}
            trouble = _check(health, line, at, checkpoints)
            metrics.write(at, line)
            if trouble is not None:
                if config.on_collapse == "stop":
                    raise CollapseError(trouble)
                if not kept and meshes.is_lead():
                    _keep(checkpoints, run)
                    print(f"{trouble}; going on, as on_collapse says", flush=True)
                kept = True
            if (save or stop) and (not health.suspect or kept):
                _save(checkpoints, at, state, batches)
            if stop:
                if meshes.is_lead():
                    print(preemption.farewell(at))
                break
            if every["validate"] and (at % every["validate"] == 0 or at == total):
                top1 = validate(functions, state, sources["test"], config.batch_size)
                metrics.write(at, {"test/top1": top1})
                clock.restart()
    if meshes.is_lead():
        plots.pretraining(run)
    return state


def open_images(config: PretrainConfig, split: str, *, quiet: bool = False) -> Source:
    """Opens a split, decoded into memory where it fits into a gibibyte.

    Raises:
      ValueError, FileNotFoundError, ImportError: as `data.open_source`; or the images' channels are
        not those of the configuration.
    """
    source = data.open_source(config.data, split)  # pyright: ignore[reportArgumentType]
    channels = len(config.augment.mean)
    if source.image_shape[-1] != channels:
        raise ValueError(
            f"{source.name} has images of shape {source.image_shape}, but augment.mean and "
            f"augment.std are of {channels} channels"
        )
    bar = Progress(len(source), "images", quiet=quiet or not meshes.is_lead())
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - began > 1:  # the digits take a tenth of that
            bar.update(done, {})

    try:
        return data.in_memory(source, show)
    finally:
        bar.close()


def validate(functions: Functions, state: TrainState, source: Source, batch_size: int) -> float:
    """Returns the online probe's accuracy on a source; all processes call it."""
    count, index = jax.process_count(), jax.process_index()
    hits = [
        functions.score(state, batch) for batch in data.ordered(source, batch_size, index, count)
    ]
    return float(np.sum(jax.device_get(hits))) / len(source)


def _check_devices(config: PretrainConfig, devices: int) -> None:
    part = config.batch_size // config.accumulate
    if part % devices:
        of = f"batch_size {config.batch_size}"
        if config.accumulate > 1:
            of += f" in {config.accumulate} parts of {part}"
        raise ValueError(f"{of} is not divisible by the {devices} devices; see --num-devices")


def _check(health: Health, line: dict[str, float], at: int, checkpoints: Checkpoints) -> str | None:
    """Returns what is wrong with a run that may go on; raises NonFiniteError for one that can't."""
    latest = checkpoints.latest()
    last = "no checkpoint was saved before"
    if latest is not None:
        last = f"the last good checkpoint is of step {latest}, in {checkpoints.path}"
    try:
        trouble = health.check(line)
    except NonFiniteError as error:
        hint = "a smaller --optim.base-lr or a longer --optim.warmup-epochs may help"
        raise NonFiniteError(f"step {at}: {error}; {last}; {hint}") from error
    return f"step {at}: {trouble}; {last}" if trouble else None


def _keep(checkpoints: Checkpoints, run: RunDir) -> None:
    """Copies the last checkpoint from before a collapse out of reach of the ones to come."""
    latest = checkpoints.latest()
    if latest is not None:
        name = f"step_{latest:012d}"
        shutil.copytree(checkpoints.path / name, run.path / "last_good" / name, dirs_exist_ok=True)


def _save(checkpoints: Checkpoints, at: int, state: TrainState, batches) -> None:
    checkpoints.save(at, state, {"batches": batches.get_state()})


def _rank(name: str) -> tuple[bool, str]:
    """Puts the metrics that are watched first before the others, since a progress bar has few."""
    return name not in ("loss", "std", "rankme", "probe/top1"), name


class _Clock:
    """Seconds spent waiting for data, and images a second, between lines of metrics."""

    def __init__(self) -> None:
        self._step = 0
        self.restart()

    def restart(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    def wait(self, fn):
        began = time.perf_counter()
        result = fn()
        self._waited += time.perf_counter() - began
        return result

    def lap(self, at: int, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        rate = (at - self._step) * batch_size / seconds
        share = self._waited / seconds
        self._step = at
        self.restart()
        return {"images_per_second": rate, "waiting": share}
