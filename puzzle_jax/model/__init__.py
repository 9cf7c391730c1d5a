"""The gpt-oss network with a different block per layer: parameters, forward pass, cache, views, sharding."""
