"""Reductions and collectives over replicas."""
