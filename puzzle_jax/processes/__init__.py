"""Several processes that act as one program, and processes that end together with what they started."""
