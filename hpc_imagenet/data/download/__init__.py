"""Download archives in byte ranges: resumed, retried, and verified by MD5."""
