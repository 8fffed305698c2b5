"""The cases: each module here has a ``CASE``, and its name is the case's; see `benchmarks.harness.case`."""
