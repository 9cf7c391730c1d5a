"""`python -m puzzle_jax.plan search|distill|grpo`."""

import sys

from puzzle_jax.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
