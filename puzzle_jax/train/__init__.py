"""Training: pretraining of the embedded parent."""
