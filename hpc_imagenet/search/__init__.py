"""A search's files in the workspace, and its study: what is drawn next, and which trials are pruned."""
