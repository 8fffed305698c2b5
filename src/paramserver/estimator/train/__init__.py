"""The training loop of an Estimator."""
