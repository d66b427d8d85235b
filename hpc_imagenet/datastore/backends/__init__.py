"""Storage backends of datastores: a folder, a host behind ssh, and S3."""
