"""The search: from a trained parent to the child that serves a deployment best, stage by stage."""
