"""The content of a ps: variables, slots, update rules, the membership of the run, and shards of checkpoints."""
