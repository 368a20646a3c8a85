"""What an ensemble is: its partition, its network, its training; and what a run is of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network of a shard."""

    hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers of a perceptron with ReLU; none makes it a linear classifier."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not all(width > 0 for width in self.hidden):
            raise ValueError(f"hidden must be positive widths, found {self.hidden}")


@dataclass(frozen=True)
class OptimConfig:
    """How a shard's network is trained."""

    name: Literal["sgd", "adam"] = "sgd"
    """sgd has Nesterov's momentum if `momentum` is above 0."""
    lr: float = 0.1
    """Learning rate, constant: a schedule over a run would make slices unequal."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Decoupled from the gradient, as in AdamW; times the learning rate."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, found {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, found {self.weight_decay}")


@dataclass(frozen=True)
class SisaConfig:
    """Sharded, isolated, sliced, aggregated training (Bourtoule et al. 2021).

    Together with a key and the records it determines every bit of the result; so nothing of it may
    be derived from the data that will be asked to be forgotten.
    """

    shards: int = 5
    """Parts of the data, each with a network of its own; S."""
    slices: int = 4
    """Parts of a shard, each with a checkpoint before it; R."""
    capacity: int = 0
    """Most records of one slice of one shard; memory is set aside for all of them. 0 leaves room
    for chance when an ensemble is first trained, and stays as it is then."""
    epochs: int = 10
    """Passes over the data that training without slices would take, e0. A shard's network sees
    2 R / (R + 1) times as many, of which its slices get equal numbers, up to rounding."""
    batch_size: int = 64
    """Records per update."""
    width: int = 0
    """Shards that a device trains at once, S at most. The last bits may depend on it, so that it is
    part of the configuration. 0: on a CPU 8, or fewer whose states its cache can hold; elsewhere
    all."""
    groups: tuple[tuple[float, int], ...] = ()
    """Sharding by the probability of deletion: pairs of an upper bound, ascending, and the number
    of shards for the records below it and above the pair before. Empty: all shards are alike."""
    optim: OptimConfig = OptimConfig()
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        """Raises ValueError where numbers are out of range or don't fit together."""
        for name in ("shards", "slices", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("capacity", "width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        if self.slices > 2 * self.epochs - 1:
            raise ValueError(
                f"{self.slices} slices are more than 2 epochs - 1 = {2 * self.epochs - 1}: some "
                "would be given no epoch. Take fewer slices or more epochs"
            )
        if not self.groups:
            return
        bounds, counts = zip(*self.groups, strict=True)
        if list(bounds) != sorted(set(bounds)) or bounds[0] <= 0 or bounds[-1] < 1:
            raise ValueError(
                f"the bounds of groups must ascend from above 0 to 1 at least, found {bounds}"
            )
        if min(counts) < 1 or sum(counts) != self.shards:
            raise ValueError(
                f"the shards of groups must be positive and {self.shards} in all, found {counts}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Labelled records with ids."""

    name: str = "digits"
    """digits (1,797 of 8×8 pixels, inside scikit-learn); a file .npz (arrays x, y, ids), .csv or
    .parquet; or a data set of tensorflow-datasets with images and labels, such as mnist."""
    test: str | None = None
    """A file of records to score on, that are never learnt from. Unset: of digits every fifth
    record, of tensorflow-datasets the split test, else none."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps its files; unset: its own default."""
    id_column: str = "id"
    """Of a table: integers or text, each once. Elsewhere, where there are no ids, records are
    numbered from 0."""
    label_column: str = "label"
    """Of a table. All its other columns are features and must be numbers; they are used as they
    are, since a mean over the records would remember those that are to be forgotten."""


@dataclass(frozen=True)
class RunConfig:
    """An ensemble in a folder."""

    data: DataConfig = DataConfig()
    sisa: SisaConfig = SisaConfig()
    aggregation: Literal["vote", "mean"] = "mean"
    """Of the shards: their votes, or the mean of their probabilities."""
    backup_days: float = 0.0
    """For so long after a request is ended, backups of the folder may be restored: its records are
    recognised and forgotten again. 0: nothing that could recognise them is kept, and what a backup
    brings back is refused."""
    seed: int = 0
    """Of the networks. The partition has a random key of its own, kept in the folder."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be in [0, 2147483648), found {self.seed}")
        if not 0 <= self.backup_days < 36500:
            raise ValueError(f"backup_days must be in [0, 36500), found {self.backup_days}")
