"""A ps's part of a checkpoint."""
