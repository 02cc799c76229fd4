"""From pretrained sources to a table of results: trials, their fan-out, scores and predictions.

``fanout`` is the module that imports Ray Tune. May import every lower layer.
"""
