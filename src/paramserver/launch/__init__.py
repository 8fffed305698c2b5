"""Starting the tasks of a run: plan it (``spec``), show it, run it as local processes (``local``).

Nothing in here imports torch, also not indirectly: the launcher has to be there at once. This file imports
nothing, because every task passes through it on its way to ``paramserver.launch.task``.
"""
