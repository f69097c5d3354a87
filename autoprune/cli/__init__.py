"""The command line: flags and wiring only."""
