"""A first job for data that nobody has described: what is in the files, and a job that fits.

Imports other folders of ``prepare`` and lower layers.
"""
