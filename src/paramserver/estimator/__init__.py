"""The Estimator: a model function, its specs, hooks, checkpoints, and the loop that runs them in every role."""
