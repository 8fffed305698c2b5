"""A worker's side of the conversation with the ps tasks."""
