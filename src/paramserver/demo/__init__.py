"""A run to look at: the main job on bundled data."""
