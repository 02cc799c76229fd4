"""From publishers' raw files to sharded Parquet: ``onetomany prepare``.

``importers`` holds one file for each publisher, ``readers`` the formats, ``engine`` what writes the
shards, ``cohorts`` one file for each clinical task, ``clinical`` the tables of variables and units.
Imports ``data`` and lower layers.
"""
