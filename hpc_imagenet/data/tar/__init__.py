"""Read, scan and write uncompressed tar files."""
