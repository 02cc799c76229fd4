"""How a backbone is adapted to a target: one file for each technique or family of techniques.

A technique imports ``core`` and the floors below it, never another technique.
"""
