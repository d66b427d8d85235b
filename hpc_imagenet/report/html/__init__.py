"""The report page: one HTML file with all trainings of a workspace, their curves, classes and data."""
