"""The results table, its statistics, and the report that is made of both.

Imports ``data``, ``checkpoints`` and the floors below them.
"""
