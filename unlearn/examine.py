"""An audit of a run: what ensembles like it keep of records that they forgot."""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.runtime import mesh as meshes
from fourfold.runtime.progress import Progress
from unlearn import data, oracles, partition
from unlearn.audit import audit_ensembles
from unlearn.data import Table
from unlearn.findings import Report
from unlearn.run import Run


def audit(
    run: Run,
    ids: Any,
    forgotten: str | None,
    models: int,
    *,
    quiet: bool = False,
) -> tuple[Report, Report]:
    """Measures what is left of records, by ensembles of the same configuration.

    Args:
      run: the ensemble.
      ids: of records in the run, whose forgetting is rehearsed; or none.
      forgotten: a file of records that were forgotten earlier, with labels; or None.
      models: ensembles that forget, and as many again that never saw the records; 8 at least.
      quiet: no progress on the terminal.

    Returns:
      The report on ensembles that forgot, and the one on ensembles that did not, which shows
      what the measures can see at this size.

    Raises:
      ValueError: there is nothing to forget, or an id or label is unknown.
    """
    table = run.table()
    gone = np.isin(table.ids, run.known(ids))
    if forgotten is not None:
        more = data.read(forgotten, run.config.data)
        labels = np.searchsorted(run.classes, more.y).clip(max=len(run.classes) - 1)
        if unknown := set(more.y[run.classes[labels] != more.y].tolist()):
            raise ValueError(f"{forgotten}: unknown labels {sorted(unknown)}")
        more = more._replace(y=labels.astype(np.int32))
        joined = (np.concatenate(pair) for pair in zip(table, more, strict=True))
        table = Table(*joined)
        table = table._replace(ids=partition.check_ids(table.ids))
        gone = np.concatenate([gone, np.ones(len(more.ids), bool)])
    if not gone.any() or models < 8:
        raise ValueError(
            "an audit needs ids or a file of forgotten records, and at least 8 models; found "
            f"{np.sum(gone)} records, {models} models"
        )
    bar = Progress(2 * models, "ensembles", quiet=quiet)
    try:
        found = oracles.margins(
            run.learner(),
            run.config.sisa,
            table,
            gone,
            models,
            meshes.make_mesh(),
            seed=run.config.seed,
            progress=lambda done, total: bar.update(done, {}),
        )
    finally:
        bar.close()
    what = f"{np.sum(gone)} records, {models} ensembles of each kind"
    after, before = (audit_ensembles(m, found.retrained) for m in (found.unlearned, found.kept))
    return Report(f"Forgotten: {what}", after), Report(f"Not forgotten, to compare: {what}", before)
