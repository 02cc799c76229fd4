"""Transferability scores, one family a file; `pipeline.transfer.scoring` computes them.

A score computes on arrays. It may import the rest of ``transfer`` and lower layers; most import
only ``core``.
"""
