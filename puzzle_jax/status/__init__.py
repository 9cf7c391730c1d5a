"""`puzzle status RUN`: the progress of a run."""
