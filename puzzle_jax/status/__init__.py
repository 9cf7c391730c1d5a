"""How far a run has come: `puzzle status RUN`."""
