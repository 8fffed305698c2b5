"""Memory for arenas and rows, and the loops over it."""
