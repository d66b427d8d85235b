"""Sources of archives: HTTP, S3, a folder of archives, class folders, parquet shards."""
