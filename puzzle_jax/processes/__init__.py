"""Several processes as one program, and processes that end with what they started."""
