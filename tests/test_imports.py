"""Imports point one way, modules do not go in circles, folders and files stay small, and the documentation says so.

    python -m tests.test_imports          prints the drawing of docs/architecture.md
    python -m tests.test_imports --write  writes it there

Imports are read from the source: at the top of a module, inside functions, and those for type checkers alone.
"""

import ast
import sys
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "puzzle_jax"
ARCHITECTURE = ROOT / "docs/architecture.md"
MARKERS = "<!-- imports: written by tests/test_imports.py -->", "<!-- /imports -->"

FOUNDATION = "foundation"
"""Modules directly in the package, and packages without arrays: what everything may import."""

ORDER = (
    (FOUNDATION,),
    ("report",),
    ("kernels",),
    ("model",),
    ("convert_hf", "tasks"),
    ("generate",),
    ("program", "costs"),
    ("evaluate",),
    ("train",),
    ("search",),
    ("plan", "doctor"),
    ("run",),
    ("status",),
    ("cli",),
)
"""Levels from the bottom; a package imports itself and lower levels."""

UNPLACED = {"processes", "settings"}
"""Packages that belong to the foundation."""

APART = {"serve_vllm"}
"""Packages that import nothing else of `puzzle_jax`, and that nothing else imports."""

LEAVES = {"report": {FOUNDATION}}
"""All that these packages may import."""

MOST_MODULES, MOST_LINES = 16, 400
LONG_FOR_A_REASON = "over 400 lines"
"""Words that the docstring of a longer file must contain, with the reason."""


@cache
def modules() -> dict[str, Path]:
    """Path of every module by its name."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Modules of the package that each module imports."""
    found = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = {target for node in ast.walk(ast.parse(path.read_text())) for target in imported(node, package)}
        found[name] = frozenset(targets - {name})
    return found


def imported(node: ast.AST, package: str) -> list[str]:
    """Modules of the package that an import statement names; `package` is where relative ones start."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
        source = ".".join(filter(None, (base, node.module)))
        names = [f"{source}.{alias.name}" for alias in node.names]
    return [known for name in names if name.split(".")[0] == PACKAGE for known in [module_of(name)] if known]


def module_of(name: str) -> str:
    """The longest part of a dotted name that is a module."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


def part_of(module: str) -> str:
    """The package of the drawing that a module belongs to."""
    part = module.split(".")[1] if "." in module else ""
    placed = {name for level in ORDER for name in level} | APART
    is_package = part and (ROOT / PACKAGE / part).is_dir()
    return part if part in placed or (is_package and part not in UNPLACED) else FOUNDATION


@cache
def parts() -> dict[str, set[str]]:
    """The imports of each package of the drawing."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports().items():
        found[part_of(module)] |= {part_of(target) for target in targets} - {part_of(module)}
    return dict(found)


def drawing() -> str:
    """The order of the packages from the bottom, and what each imports of those below."""
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    lines = []
    for names in ORDER:
        for name in (name for name in names if name in parts()):
            below = sorted(parts()[name] - {FOUNDATION}, key=lambda part: (level[part], part))
            lines.append(f"{name:<12} <- {', '.join(below)}" if below else name)
    return "\n".join(lines)


def documented() -> str:
    return ARCHITECTURE.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip().strip("`").strip()


def write() -> None:
    """Puts the drawing between the markers."""
    before, _, rest = ARCHITECTURE.read_text().partition(MARKERS[0])
    ARCHITECTURE.write_text(f"{before}{MARKERS[0]}\n```\n{drawing()}\n```\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")


def test_imports_point_one_way():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    upward = []
    for module, targets in imports().items():
        for target in targets:
            one, other = part_of(module), part_of(target)
            if one == other:
                continue
            apart = one in APART or other in APART
            above = not apart and level[other] >= level[one]
            if apart or above or other not in LEAVES.get(one, {other}):
                upward.append(f"{module} -> {target}")
    assert not sorted(upward)


def test_every_package_has_a_place():
    assert set(parts()) - {FOUNDATION} <= {name for level in ORDER for name in level} | APART


def test_modules_do_not_import_in_circles():
    # A package's __init__ is imported with each of its modules, so circles through it do not show here; the two within
    # serve_vllm come from the form of vLLM's plugins.
    graph = {module: targets for module, targets in imports().items() if part_of(module) not in APART}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_folders_and_files_stay_small():
    folders = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in folders.items() if count > MOST_MODULES}
    long = {}
    for name, path in modules().items():
        text = path.read_text()
        lines, doc = len(text.splitlines()), ast.get_docstring(ast.parse(text)) or ""
        if lines > MOST_LINES and LONG_FOR_A_REASON not in " ".join(doc.split()):
            long[name] = lines
    assert not long


def test_the_drawing_is_the_documentation_s():
    assert documented() == drawing(), "python -m tests.test_imports --write"


if __name__ == "__main__":
    write() if "--write" in sys.argv else print(drawing())
