"""What every part of the library agrees on.

The contracts (modality, backbone, objective, technique), batches, ragged arrays, Arrow lists and
random numbers. Two folders have a layer of their own: ``metrics``, and ``nn``, the parts of
networks that several models and objectives share. Imports ``config`` and lower layers.
"""
