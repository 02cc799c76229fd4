"""What a user would pick instead of a network, one file each (`pipeline.core.contracts`).

A baseline imports ``media``, ``nn`` and lower layers, never another baseline.
"""
