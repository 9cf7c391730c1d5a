"""The memory that a search or a training run needs on every device, found without weights and without accelerators."""
