"""Scores, cached features, fan-out, results and report."""
