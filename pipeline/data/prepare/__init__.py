"""Publishers' raw files to sharded Parquet of encoded images: one importer a file, over files,
pixels, write and summary.
"""
