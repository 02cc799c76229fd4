"""Rows on their way to a training step: manifests, the plan of their order, decoding, streaming.

``stream`` is the module that imports Ray Data. Imports ``media`` and lower layers.
"""
