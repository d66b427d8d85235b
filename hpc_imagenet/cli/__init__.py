"""Command line: parse the words, dispatch to a command, return an exit code."""
