"""Strategies: the distribution of a program, and the model and optimizer that it trains."""
