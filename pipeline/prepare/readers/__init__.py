"""Formats of raw files: archives, CSV, Parquet, video, and checks of what was read.

Imports layers below ``prepare`` and the records that ``engine`` shares with it, never an importer.
"""
