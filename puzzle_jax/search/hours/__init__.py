"""How long a search takes: by its settings before it runs, and what is left while it does."""
