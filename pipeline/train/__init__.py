"""The one training loop and everything that sets it up.

``launch`` is the module that imports Ray Train. Imports ``data``, ``checkpoints`` and lower
layers.
"""
