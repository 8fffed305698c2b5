"""Benchmarks of paramserver: ``python -m benchmarks`` measures what the project promises."""
