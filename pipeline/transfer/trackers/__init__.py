"""Programs that collect runs of experiments, one file each (`pipeline.core.contracts.tracker`).

A tracker imports ``core`` and lower layers, and its client only when it is used; never another
tracker.
"""
