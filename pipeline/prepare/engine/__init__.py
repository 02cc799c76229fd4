"""What turns raw files into Parquet shards: in parallel, resumable and with checksums."""
