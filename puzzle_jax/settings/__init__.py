"""Settings of every command, from recipes and the command line."""
