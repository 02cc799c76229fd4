"""Formats of raw files: archives, CSV, Parquet, video, and checks of what was read."""
