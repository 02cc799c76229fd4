"""Ways to write a bundle elsewhere, one file each.

An export imports the rest of ``checkpoints`` and lower layers, never another export.

Each is a function that is registered as ``@register("export", NAME)``, with a docstring whose first
paragraph says what the export is for and what opens it::

    def export(saved: Bundle, output: str, backbone_only: bool) -> str

It writes to ``output``, compares what it wrote with the bundle and returns what it did in words,
with the largest difference. It raises BundleError, and writes nothing, where the bundle cannot be
written so, or gives other numbers.

``--kind lerobot`` writes prepared episodes too: `pipeline.prepare.lerobot_export`.
"""
