"""Lightning callbacks: checkpoints, progress and the bottleneck report."""
