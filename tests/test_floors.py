"""A folder of the package imports only from folders below it, and never in a circle."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "cryoalign"

# Low to high. Folders on one floor do not import each other.
FLOORS = (
    ("pose", "runtime"),
    ("io", "images"),
    ("particles", "operators"),
    ("search", "results"),
    ("methods", "report"),
    ("app", "learn"),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
# Which module alone may use what.
ONE_HOME = {"torch.distributed": {"runtime.processes"}, "grid_sample": {"images.geometry"}}


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
    """What breaks the rules."""
    graph = edges(modules)
    folder = {name: name.split(".")[0] for name in modules}
    found = [f"{name} is on no floor" for name in modules if folder[name] not in LEVEL]
    for name, others in graph.items():
        for other in sorted(others):
            here, there = (LEVEL.get(folder[each], 0) for each in (name, other))
            if folder[name] != folder[other] and there >= here:
                found.append(f"{name} imports {other}, which is not below it")
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


def test_the_package_keeps_the_rules():
    assert complaints(sources(PACKAGE)) == []


def test_every_folder_has_a_floor_and_says_what_it_holds():
    for path in PACKAGE.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert path.name in LEVEL
            docstring = ast.get_docstring(ast.parse((path / "__init__.py").read_text("utf-8")))
            assert docstring, f"{path.name}/__init__.py says nothing"


def test_each_fault_of_a_made_up_package_is_found():
    def found(**modules: str) -> list[str]:
        return complaints({k.replace("__of__", "."): ast.parse(v) for k, v in modules.items()})

    polar = "images__of__polar"
    assert found(pose="", **{polar: "from cryoalign.pose import Pose"}) == []
    assert found(pose="import cryoalign.images.polar", **{polar: ""}) == [
        "pose imports images.polar, which is not below it"
    ]
    assert found(pose="def f():\n from cryoalign.images import polar", **{polar: ""}) == [
        "pose imports images.polar, which is not below it"
    ]
    assert found(pose="from .images import polar", **{polar: ""}) == [
        "pose imports images.polar, which is not below it"
    ]
    assert found(io="import cryoalign.images.polar", **{polar: ""}) == [
        "io imports images.polar, which is not below it"
    ]
    assert found(methods="from cryoalign import align", __init__="") == [
        "methods imports __init__, which is not below it"
    ]
    circle = found(images__of__a="import cryoalign.images.b", images__of__b="from .a import x")
    assert len(circle) == 1
    assert circle[0].startswith("circle: ")
    assert found(helpers="") == ["helpers is on no floor"]
    for text in (
        "import torch\nx = torch.distributed.get_rank()",
        "from torch import distributed as d",
        "import torch.distributed as d",
    ):
        assert "torch.distributed" in found(methods=text)[0]
    for text in (
        "import torch.nn.functional as F\nF.grid_sample(1)",
        "from torch.nn.functional import grid_sample",
    ):
        assert "grid_sample" in found(images__of__polar=text)[0]
