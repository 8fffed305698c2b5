"""The state of a run, as seen from outside."""
