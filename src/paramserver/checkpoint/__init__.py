"""Checkpoints as folders of a model_dir in any storage: no file here talks to a ps."""
