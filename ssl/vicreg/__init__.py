"""VICReg: self-supervised learning by variance, invariance and covariance.

`losses`, `covariance`, `augment`, `models`, `optim` and `step` are pure functions to import and
combine; `train`, `probe` and `cli` run whole experiments. Nothing is imported here, so that each
module costs only what it needs: `from vicreg import losses`.
"""
