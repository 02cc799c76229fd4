"""Row order, streams and memory tables: from files to device batches."""
