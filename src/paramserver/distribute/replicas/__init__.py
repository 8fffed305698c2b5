"""The threads of replicas, and their contexts."""
