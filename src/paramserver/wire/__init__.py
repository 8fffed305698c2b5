"""Bytes and typed messages, without any input or output."""
