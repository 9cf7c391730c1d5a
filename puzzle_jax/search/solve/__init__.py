"""The choice of the alternatives that make up a child."""
