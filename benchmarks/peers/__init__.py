"""What people use in the place of paramserver, measured beside it: ``python -m benchmarks.peers``.

Rules
    * A peer trains the models of ``benchmarks.models`` with one ps and two workers, one thread for each task, as far as
      it knows such tasks, and is written as its own documentation writes it.
    * Its processes run in an environment of its own, made from pinned requirements. They import that, and of the
      benchmarks only what that environment can import.
    * Steps are counted as ours are: those of all workers together in a window of time, by `benchmarks.participant`.
"""
