"""Storage backends of a datastore: a folder, a host behind ssh, S3."""
