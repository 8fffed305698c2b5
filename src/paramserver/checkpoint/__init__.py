"""Checkpoints as folders of a model_dir, wherever that lies: nothing here talks to a ps."""
