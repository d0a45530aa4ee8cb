"""The command line: settings, runs, checks."""
