"""Metrics of predictions, of which every one can be computed again on resampled test rows.

Imports ``config`` and lower layers.
"""
