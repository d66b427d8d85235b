"""The demo: handwritten digits as ILSVRC-shaped archives, served over HTTP."""
