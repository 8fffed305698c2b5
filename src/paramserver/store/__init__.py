"""What one ps holds: variables, slots, update rules, who takes part, and shards of checkpoints."""
