"""The machinery that runs and measures cases. None of its modules imports a case by name."""
