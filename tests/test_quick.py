"""`make quick` has at least one test of every folder."""

from tests.paths import ROOT

LISTED = [line for line in (ROOT / "tests/quick.txt").read_text().splitlines() if not line.startswith("#")]
ELSEWHERE = {"tests/parity", "tests/runtimes"}  # need other environments


def test_every_folder_has_a_quick_test():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")} - ELSEWHERE
    assert {line.partition("::")[0].rpartition("/")[0] for line in LISTED} == folders


def test_what_is_listed_exists():
    for line in LISTED:
        file, _, name = line.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), line
