"""A ps task: its connections, its threads, and the handlers of requests."""
