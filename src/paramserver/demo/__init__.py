"""A run for a first look: the main job on bundled data."""
