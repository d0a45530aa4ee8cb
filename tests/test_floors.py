"""Reading order is dependency order: a module imports from below, and never in a circle."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "cryoalign"

# Low to high. ``io`` as a whole lies on the ground floor.
FLOORS = {
    "ground": ("settings", "files", "workers", "interop", "pose", "distributed", "yaml12", "io"),
    "image": (
        "geometry", "filters", "ctf", "frc", "screen", "polar", "kernels", "average",
        "particles", "seeding", "synthetic", "dataset", "stream",
    ),
    "correlate": (
        "products", "correlate", "fourier_rings", "observations", "steerable", "invariants",
    ),
    "search": (
        "refine", "solvers", "forward", "joint", "uncertainty", "adaptive", "search", "expectation",
        "band", "evidence", "implicit", "pairs",
    ),
    "align": (
        "assign", "alignment", "checkpoint", "quality", "alternation", "matching", "mra",
        "schedule", "rfa", "layers",
    ),
    "classify": (
        "merge", "climb", "classification", "stability", "realign", "ordering", "generations",
        "isac",
    ),
    "look": ("export", "estimators", "plot", "report"),
    "run": ("schema", "config", "check", "doctor", "progress", "results", "run", "cli", "__main__"),
    "package": ("__init__",),
}  # fmt: skip
FLOOR = {module: level for level, floor in enumerate(FLOORS.values()) for module in floor}
# Who alone may know of what.
ONE_HOME = {"torch.distributed": {"distributed"}, "grid_sample": {"geometry"}}


def sources(package: Path) -> dict[str, ast.Module]:
    """Parsed modules by dotted name within the package; a folder's __init__ has its name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def targets(tree: ast.Module, module: str, folders: set[str]) -> set[str]:
    """Full dotted names that a module imports anywhere, functions and TYPE_CHECKING included."""
    home = ["cryoalign", *module.split(".")]
    if module not in folders:
        home = home[:-1]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def edges(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which of our modules each of our modules imports."""
    folders = {name.rpartition(".")[0] for name in modules} - {""}
    graph = {}
    for module, tree in modules.items():
        graph[module] = set()
        for target in targets(tree, module, folders):
            if target.split(".")[0] != "cryoalign":
                continue
            parts = target.split(".")[1:]
            # The longest part that is a module; what nothing matches comes from __init__.
            while parts and ".".join(parts) not in modules:
                parts.pop()
            graph[module].add(".".join(parts) or "__init__")
    return graph


def complaints(modules: dict[str, ast.Module]) -> list[str]:
    """What is wrong with the house."""
    graph = edges(modules)
    level = {name: FLOOR.get(name.split(".")[0]) for name in modules}
    found = [f"{name} is on no floor" for name in modules if level[name] is None]
    found += [
        f"{name} imports {other} from above"
        for name, others in graph.items()
        for other in sorted(others)
        if (level[other] or 0) > (level[name] or 0)
    ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    for name, tree in modules.items():
        text = ast.dump(tree)
        aliases = targets(tree, name, set())
        for what, homes in ONE_HOME.items():
            used = any(t == what or t.startswith(f"{what}.") for t in aliases)
            used |= any(t.rpartition(".")[2] == what for t in aliases)
            # An attribute of something else imported: F.grid_sample, torch.distributed.
            used |= f"attr='{what.rpartition('.')[2]}'" in text and name not in homes
            if used and name not in homes:
                found.append(f"{name} uses {what}: only {', '.join(homes)} may")
    return found


def test_the_house_stands():
    assert complaints(sources(PACKAGE)) == []


def test_every_listed_module_exists():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(FLOOR) <= there


def test_it_would_be_told():
    """Each fault of a made-up house is found: the test can fail."""

    def house(**modules: str) -> list[str]:
        return complaints({name: ast.parse(text) for name, text in modules.items()})

    assert house(pose="", geometry="from cryoalign.pose import Pose") == []
    assert house(pose="import cryoalign.geometry", geometry="") == [
        "pose imports geometry from above"
    ]
    assert house(pose="def f():\n from cryoalign import mra", mra="") == [
        "pose imports mra from above"
    ]
    assert house(pose="from . import mra", mra="") == ["pose imports mra from above"]
    assert house(mra="from cryoalign import align", __init__="") == [
        "mra imports __init__ from above"
    ]
    assert "circle" in house(frc="import cryoalign.filters", filters="from .frc import x")[0]
    assert house(helpers="") == ["helpers is on no floor"]
    assert "torch.distributed" in house(mra="import torch\nx = torch.distributed.get_rank()")[0]
    assert "torch.distributed" in house(mra="from torch import distributed as d")[0]
    assert "torch.distributed" in house(mra="import torch.distributed as d")[0]
    assert "grid_sample" in house(polar="import torch.nn.functional as F\nF.grid_sample(1)")[0]
    assert "grid_sample" in house(polar="from torch.nn.functional import grid_sample")[0]
