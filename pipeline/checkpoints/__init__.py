"""What training leaves and what it may start from.

Bundles of our own, checkpoints of timm, transformers and torchaudio, and exports to them. Imports
``media`` and lower layers.
"""
