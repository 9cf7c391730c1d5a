"""The whole road in one command: `puzzle run`."""
