"""What replicas combine among themselves, with gradients."""
