"""Programs of the processes that take part in a measurement."""
