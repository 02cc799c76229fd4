"""One file for each publisher or layout of raw files.

An importer imports other folders of ``prepare`` (but ``new_job``) and lower layers, never another
importer.
"""
