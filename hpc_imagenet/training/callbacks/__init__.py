"""Lightning callbacks: checkpoints, progress, bottleneck report."""
