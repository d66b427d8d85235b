"""Named, versioned datasets: index, manifest, the folder form, and the reader that training uses."""
