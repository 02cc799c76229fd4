"""Images, sound, text, episodes and static features as arrays, without any knowledge of training.

Imports ``core`` and lower layers.
"""
