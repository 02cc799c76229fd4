"""How rows become tensors: one file for each modality.

A modality imports ``media`` and the floors below it, never another modality.
"""
