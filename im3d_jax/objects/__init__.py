"""Object stores, such as S3 and Google Cloud Storage: URLs, what lies there, leases in place of locks.

fsspec speaks to the stores, by s3fs, gcsfs and the like. None of them is imported before a URL is given.
"""
