"""Archives in the layout of ILSVRC2012: development kit, scan, labels."""
