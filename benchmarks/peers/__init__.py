"""Other ways to train, measured beside paramserver: ``python -m benchmarks peers``.

Rules
    * A peer trains the models of `benchmarks.models.shapes` with one ps and two workers, one thread for each task, as
      far as it has such tasks, and is written as its own documentation shows.
    * Its processes run in an environment of its own, made from pinned requirements. Of the benchmarks they import only
      modules that need no other package.
    * Steps are counted as ours are: those of all workers together in a window, by `benchmarks.harness.participant`.
"""
