"""Training: pretraining of the embedded parent, distillation, reinforcement learning and averages of weights."""
