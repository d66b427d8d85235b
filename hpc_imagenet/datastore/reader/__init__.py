"""Random access to the images of a version."""
