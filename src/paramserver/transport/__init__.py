"""The lanes on which bytes go between two tasks."""
