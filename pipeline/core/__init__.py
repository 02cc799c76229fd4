"""What every part of the library agrees on.

The contracts (modality, backbone, objective, technique), batches, ragged arrays, Arrow lists and
random numbers. Imports ``config`` and lower layers.
"""
