"""An ensemble with the interface of scikit-learn, kept in memory, that can forget."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fourfold.runtime import mesh as meshes
from unlearn import models, partition, programs, sisa
from unlearn.config import ModelConfig, OptimConfig, SisaConfig
from unlearn.programs import Programs, digest
from unlearn.sisa import Learner
from unlearn.trainer import Records, States, Trainer, first_slices


class SisaClassifier:
    """A classifier whose records can be removed exactly (Bourtoule et al. 2021).

    After `forget`, every bit of it is what `fit` with the same arguments on the records that are
    left would have come to; `hashes_` shows it. What it learnt of the data as a whole has to be
    given for that: pass `classes` and `capacity` where they shall not come from the first `fit`.

    It follows scikit-learn's conventions without needing it, but `fit` checks its input with it.
    """

    def __init__(
        self,
        *,
        shards: int = 5,
        slices: int = 4,
        epochs: int = 20,
        batch_size: int = 32,
        hidden: tuple[int, ...] = (64,),
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        aggregation: Literal["vote", "mean"] = "mean",
        classes: Any = None,
        capacity: int | None = None,
        width: int = 0,
        random_state: int = 0,
    ) -> None:
        """Keeps the arguments.

        Args:
          shards: parts of the data with a network each.
          slices: parts of a shard, with a checkpoint before each.
          epochs: passes that training without slices would take; see `SisaConfig`.
          batch_size: records per update.
          hidden: widths of the network's hidden layers.
          optimizer: sgd has Nesterov's momentum.
          lr: learning rate.
          momentum: of sgd.
          weight_decay: decoupled, as in AdamW.
          aggregation: of the shards: their votes, or the mean of their probabilities.
          classes: all labels there can be, sorted; None takes those of `fit`.
          capacity: most records of a slice; None leaves room for chance at `fit`.
          width: shards that a device trains at once; 0 for a number that suits it.
          random_state: non-negative, of the partition and the networks. Who knows it can tell which
            shard a record is in.
        """
        self.shards = shards
        self.slices = slices
        self.epochs = epochs
        self.batch_size = batch_size
        self.hidden = hidden
        self.optimizer: Literal["sgd", "adam"] = optimizer
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.aggregation: Literal["vote", "mean"] = aggregation
        self.classes = classes
        self.capacity = capacity
        self.width = width
        self.random_state = random_state

    def fit(self, X: Any, y: Any, ids: Any = None) -> SisaClassifier:  # noqa: N803
        """Trains all shards.

        Args:
          X: numbers `(N, F)`, taken as float32.
          y: labels `(N,)`.
          ids: integers or text `(N,)`, by which records can be removed; None for 0..N-1.

        Returns:
          Itself, with `classes_`, `n_features_in_`, `config_`, `ids_` and `hashes_`.

        Raises:
          ValueError: X or y are not as above, or not finite; ids are not unique; a label is not
            among `classes`; a slice is over its capacity.
        """
        validation = _validation()
        X, y = validation.validate_data(self, X, y, dtype=np.float32)  # noqa: N806
        from sklearn.utils.multiclass import check_classification_targets

        check_classification_targets(y)
        found = np.unique(y)
        self.classes_ = found if self.classes is None else np.asarray(self.classes)
        unknown = np.setdiff1d(found, self.classes_)
        if len(unknown):
            raise ValueError(
                f"labels must be among {partition.some(self.classes_)}, found "
                f"{partition.some(unknown)}"
            )
        self.ids_ = partition.check_ids(np.arange(len(X)) if ids is None else ids)
        if len(self.ids_) != len(X):
            raise ValueError(f"ids must be as many as the {len(X)} records, found {len(self.ids_)}")
        self.config_ = self._config(len(X))
        key = hashlib.blake2b(f"unlearn {self.random_state}".encode(), digest_size=32).digest()
        places = partition.assign(self.ids_, self.config_, key)
        partition.check_capacity(places, self.config_, may_be_empty=True)
        labels = np.searchsorted(self.classes_, y).astype(np.int32)
        self._states: States = {}
        self._train(Records(X, labels, places), None)
        return self

    def forget(self, ids: Any) -> SisaClassifier:
        """Removes records, and retrains what they had a part in.

        Args:
          ids: of records that were given to `fit`; one that occurs twice counts once.

        Returns:
          Itself, as if the records had never been there.

        Raises:
          ValueError: an id is unknown, or of a record that is gone already, or no record would be
            left; nothing is changed then.
        """
        _validation().check_is_fitted(self)
        wanted = np.asarray(ids)
        if not wanted.size:
            return self
        wanted = partition.check_ids(np.unique(wanted))
        if wanted.dtype.kind != self.ids_.dtype.kind:
            raise ValueError(f"ids must be of type {self.ids_.dtype}, found {wanted.dtype}")
        unknown = np.setdiff1d(wanted, self.ids_)
        if len(unknown):
            raise ValueError(
                f"{len(unknown)} ids are not of this ensemble: "
                f"{partition.some(unknown)}; nothing was changed"
            )
        gone = np.isin(self.ids_, wanted)
        if gone.all():
            raise ValueError("no record would be left; nothing was changed")
        start = first_slices(self._records.places, gone)
        self._train(self._records.take(~gone), start)
        self.ids_ = self.ids_[~gone]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Returns what the ensemble gives each class of `classes_`, `(N, C)`."""
        X = self._validated(X)  # noqa: N806
        probs = self._programs().predict(self._stacked, X)
        return np.asarray(sisa.aggregate(probs, self.aggregation, jnp.asarray(self._serving)))

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Returns the likeliest label of each record, `(N,)`."""
        probs = self.predict_proba(X)
        return self.classes_[probs.argmax(axis=1)]

    def score(self, X: Any, y: Any) -> float:  # noqa: N803
        """Returns the share of labels that `predict` gets right."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    @property
    def hashes_(self) -> list[str]:
        """The SHA-256 of each shard's network and optimiser."""
        return [digest(self._states[s, self.slices]) for s in range(self.shards)]

    def _config(self, count: int) -> SisaConfig:
        config = SisaConfig(
            shards=self.shards,
            slices=self.slices,
            epochs=self.epochs,
            batch_size=self.batch_size,
            width=self.width,
            optim=OptimConfig(self.optimizer, self.lr, self.momentum, self.weight_decay),
            model=ModelConfig(tuple(self.hidden)),
            capacity=self.capacity or 1,
        )
        if self.capacity is None:
            return dataclasses.replace(config, capacity=partition.capacity_for(count, config))
        return config

    def _train(self, records: Records, start: dict[int, int] | None) -> None:
        """Trains shards; what served before is replaced when all are done."""
        key = jax.random.key(self.random_state)
        trainer = Trainer(self._learner(), self.config_, key, meshes.make_mesh())
        states = trainer.train(records, start, self._states)
        last = [states[shard, self.slices] for shard in range(self.shards)]
        self._stacked = programs.stack(last)
        self._serving = np.isin(np.arange(self.shards), records.places.shard)
        self._states, self._records = states, records

    def _validated(self, X: Any) -> np.ndarray:  # noqa: N803
        validation = _validation()
        validation.check_is_fitted(self)
        return validation.validate_data(self, X, dtype=np.float32, reset=False)

    def _learner(self) -> Learner:
        return models.make_learner(self.config_.model, self.config_.optim, len(self.classes_))

    def _programs(self) -> Programs:
        return programs.programs(self._learner(), meshes.make_mesh())

    # What scikit-learn's base class would bring, which may not be there.
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        del deep  # none of them is an estimator
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> SisaClassifier:
        """Changes arguments of the constructor, for the next `fit`.

        Raises:
          ValueError: there is no argument of that name.
        """
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"no parameter {name!r}; there are {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({params})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_records")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(),
        )


def _validation() -> Any:
    try:
        from sklearn.utils import validation
    except ImportError as error:
        raise ImportError(
            "SisaClassifier needs scikit-learn: pip install 'fourfold[unlearn]'"
        ) from error
    return validation
