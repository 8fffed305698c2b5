"""Strategies: how a program is distributed, and the model and optimizer that it trains."""
