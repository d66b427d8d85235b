"""Reading what was downloaded: tar offsets, the devkit, the makers of ILSVRC-shaped archives."""
