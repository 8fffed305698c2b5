"""The input of a worker: batches for its replicas."""
