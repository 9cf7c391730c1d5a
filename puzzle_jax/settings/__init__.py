"""Settings of every command: from files, names and the command line."""
