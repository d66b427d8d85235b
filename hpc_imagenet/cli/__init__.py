"""Command line: parse arguments, dispatch to a command or submit, return an exit code."""
