"""From archives or images to a dataset: download, index, prepare, verify."""
