"""A model that is bound to the memory that the lanes read and write."""
