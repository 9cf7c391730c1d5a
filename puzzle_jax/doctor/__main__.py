"""`puzzle doctor` (`python -m puzzle_jax.doctor`): versions, devices, and what serves each operation here."""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "": Verb(
        name="doctor",
        summary="Prints versions, devices, and what serves each operation here and why others do not.",
        settings="puzzle_jax.doctor.command:DoctorSettings",
        run="puzzle_jax.doctor.command:run",
        shown=("model", "tokens", "slots", "json"),
        example="--model DIR",
    ),
}


main = partial(run_table, "doctor", VERBS)

if __name__ == "__main__":
    sys.exit(main())
