"""Transferability scores, one family a file; `pipeline.transfer.scoring` computes them.

A family may import the rest of ``transfer`` and lower layers; it computes with arrays alone, so
that few need more than ``core``.
"""
