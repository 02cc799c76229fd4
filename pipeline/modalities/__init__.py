"""How rows become tensors: one file for each modality.

A modality imports ``media``, ``nn`` and lower layers, never another modality.
"""
