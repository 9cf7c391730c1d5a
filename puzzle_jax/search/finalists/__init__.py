"""Children that are trained for a while before one of them is chosen."""
