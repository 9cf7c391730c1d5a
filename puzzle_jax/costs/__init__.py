"""What an architecture costs in a deployment: bytes, and seconds by arithmetic, by measurement, or from elsewhere."""
