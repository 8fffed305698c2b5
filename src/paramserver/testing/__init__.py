"""Public helpers for tests: conformance kits and local clusters."""
