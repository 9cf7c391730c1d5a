"""Which experts of a layer matter."""
