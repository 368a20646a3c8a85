"""VICReg: self-supervised learning by variance, invariance and covariance; empty today."""
