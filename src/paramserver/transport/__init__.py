"""Exchange: the ways that bytes go between two tasks."""
