"""What trainings and searches will cost: time, GPU-hours, energy and money."""
