"""What runs and measures a case. None of its modules imports a case by name."""
