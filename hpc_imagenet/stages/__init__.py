"""What a job can run: one module a stage, each with `run(config, run, world)`."""
