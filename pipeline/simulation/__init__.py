"""Environments with dynamics as arguments, experts for them, and episodes of policies in many at
once.
"""
