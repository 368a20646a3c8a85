"""What every part's training script stands on: devices, checkpoints, metrics, run folders.

The package knows none of the parts. Each module says one thing; import what you need from it:

- `mesh`: start of a distributed run, the device mesh, local batches to global arrays
- `checkpoint`: atomic checkpoints of a pytree and of large host arrays
- `run_dir`: the folder of a run and its configuration
- `preemption`: SIGTERM and SIGINT as a flag that the loop reads
- `metrics`: one stream of metrics to a progress bar, JSONL, TensorBoard and W&B
- `hardware`: what a result was measured on
"""
