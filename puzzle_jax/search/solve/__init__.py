"""Which alternatives a child is made of."""
