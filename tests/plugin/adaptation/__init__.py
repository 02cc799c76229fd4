"""Techniques that need more than one task and one stream of rows, one file each."""
