"""What turns raw files into Parquet shards: in parallel, resumable and with checksums.

Imports ``readers`` and layers below ``prepare``, never an importer: those are found by name.
"""
