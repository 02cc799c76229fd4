"""From publishers' raw files to sharded Parquet: ``onetomany prepare``.

``importers`` holds one file for each publisher, ``readers`` the formats, ``engine`` what writes the
shards, ``cohorts`` one file for each clinical task, ``clinical`` the tables of variables and units.
``lerobot_export`` writes prepared episodes back as a LeRobot data set.
Imports ``data`` and lower layers.
"""
