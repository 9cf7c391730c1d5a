"""Rankings of the experts of a layer."""
