"""An interactive machine as a job: Jupyter Lab on a node, how it ends, and how it is reached."""
