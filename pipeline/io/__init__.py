"""Files and the processes that write them.

Storage on disk and on S3, folders that become visible only when they are whole, checksums, the lock
that lets one run write a job's folder, and signals. Imports nothing else of the library.
"""
