"""Clinical variables: plausible ranges, units and their conversion, MIMIC-III and MIMIC-IV.

Imports ``engine``, ``readers`` and layers below ``prepare``, never an importer or a cohort.
"""
