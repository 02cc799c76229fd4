"""Simulated robots: environments, experts, rollouts and their pictures (extra ``robotics``).

Imports ``core`` and lower layers.
"""
