"""Where archives come from: HTTP, S3, a folder, class folders, parquet."""
