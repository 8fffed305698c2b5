"""Evaluation and prediction of an Estimator."""
