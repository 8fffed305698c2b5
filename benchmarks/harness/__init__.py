"""What runs and measures a case. No module of it knows a case or a peer."""
