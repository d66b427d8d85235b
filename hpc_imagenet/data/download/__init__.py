"""Download archives in ranges, resumed, retried and verified by MD5."""
