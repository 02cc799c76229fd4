"""The results table, its statistics, and the report that is made of both.

Imports ``data``, ``metrics`` and lower layers.
"""
