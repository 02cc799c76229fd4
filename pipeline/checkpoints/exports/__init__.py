"""Ways to write a bundle elsewhere, one file each.

Each is a function that is registered as ``@register("export", NAME)``, with a docstring whose first
paragraph says what the export is for and what opens it::

    def export(found: Bundle, output: str, backbone_only: bool) -> str

It writes to ``output``, compares what it wrote with the bundle and returns what it did in words,
with the largest difference. It raises BundleError, and writes nothing, where the bundle cannot be
written so, or gives other numbers.

``--kind lerobot`` is none of these: it writes prepared episodes, `pipeline.prepare.lerobot_export`.
A policy folder would need a class of LeRobot's that holds our networks exactly: linear layers with
GELU, or GPT-2 over observations and actions. Release 0.6.1 has none:

- ``act``, ``gaussian_actor`` and ``tdmpc`` have a LayerNorm in every layer;
- ``vqbet`` takes actions from a codebook;
- ``diffusion`` and the vision-language models denoise actions, or write them as tokens.

A type of our own would open only where a plugin of ours is installed. ``onnx`` and ``torch-export``
hold a policy exactly.
"""
