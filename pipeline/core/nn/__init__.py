"""Parts of networks that several objectives and models share.

Losses, a feature pyramid, gathering over ranks, the arithmetic of convolutions, heads for actions.
Imports ``core`` and lower layers.
"""
