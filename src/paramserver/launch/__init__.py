"""Starting the tasks of a run: plan it (``spec``), show it, run it as local processes (``local``).

No file in here imports torch, not even indirectly, because the launcher has to start at once. This file imports
nothing, because every task passes through it on its way to ``paramserver.launch.task``.
"""
