"""The whole pipeline in one command: `puzzle run`."""
