"""A model bound to the memory that the lanes read and write."""
