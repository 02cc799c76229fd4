"""What a job file may say.

The schema of a job, the YAML loader, the registry of modalities, models, objectives, techniques,
metrics, scores, importers and cohorts, and the record of which code made a result. Imports ``io``
only, and nothing heavy: a job file is checked before torch is imported.
"""
