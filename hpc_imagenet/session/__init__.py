"""Interactive sessions: Jupyter Lab on a node, its access and its end."""
