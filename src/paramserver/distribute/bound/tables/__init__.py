"""Embedding tables of a bound model."""
