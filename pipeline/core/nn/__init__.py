"""Parts of networks that several objectives and models share.

Losses, a feature pyramid, gathering over ranks, the arithmetic of convolutions, heads for actions,
and the bases of objectives with a linear head or with a loss for each position.
Imports ``core`` and lower layers.
"""
