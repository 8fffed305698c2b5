"""The layout that all tasks agree on before a byte moves: variables, arenas, blocks, partitions, rules."""
