"""The rooms of stnify and who may enter whom. This table is the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import stnify

MAY_IMPORT: dict[str, set[str]] = {
    # Parts, which know no stage and not each other.
    "errors": set(),
    "rows": set(),
    "streams": set(),
    "patterns": {"errors"},
    "nested": set(),
    "kept": set(),
    "untouched": {"kept"},
    "attributes": set(),
    "delegated": set(),
    "layers": {"rows"},
    "regularizers": {"errors", "rows"},
    "augment": {"errors"},
    "penalties": {"errors", "rows"},
    "targets": {"augment", "errors", "rows"},
    "composites": set(),
    "products": {"layers"},
    "calls": {"composites", "errors", "layers", "products"},
    "checkpoints": set(),
    "shadow": set(),
    "swap": {"calls", "checkpoints", "layers", "shadow", "untouched"},
    "constants": set(),
    "forward_mode": {"composites", "constants"},
    # Stages, in the order data flows through them.
    "declare": {"errors"},
    "presets": {"declare"},
    "space": {"declare", "errors"},
    "trace": {"kept", "patterns", "untouched"},
    "plan": {"space", "trace"},
    "planning": {
        "composites",
        "declare",
        "errors",
        "layers",
        "patterns",
        "plan",
        "products",
        "space",
        "trace",
    },
    "inventory": {"declare", "plan", "trace"},
    "tunable": {
        "attributes",
        "augment",
        "checkpoints",
        "delegated",
        "errors",
        "kept",
        "layers",
        "penalties",
        "regularizers",
        "space",
        "streams",
        "targets",
    },
    "rewrite": {
        "augment",
        "errors",
        "layers",
        "penalties",
        "plan",
        "regularizers",
        "space",
        "streams",
        "swap",
        "trace",
        "tunable",
    },
    "layouts": {"nested", "rows", "tunable"},
    "verify": {"errors", "layouts", "nested", "rows", "streams", "tunable", "untouched"},
    "perturb": {"space"},
    "linearize": {
        "errors",
        "forward_mode",
        "nested",
        "perturb",
        "regularizers",
        "tunable",
        "untouched",
    },
    "compiled": {"linearize", "perturb"},
    "uncentred": {"penalties", "perturb", "plan", "rows", "space", "streams", "tunable"},
    "objective": {
        "augment",
        "declare",
        "errors",
        "penalties",
        "perturb",
        "plan",
        "space",
        "targets",
        "tunable",
    },
    "step": {"errors", "linearize", "nested", "objective", "perturb", "rows", "tunable"},
    "flops": {
        "errors",
        "layers",
        "linearize",
        "nested",
        "perturb",
        "rows",
        "step",
        "streams",
        "tunable",
        "untouched",
    },
    "loaders": {"errors", "streams"},
    "schedule": {"errors"},
    "response_optimizer": set(),
    "optimizer": {"errors", "tunable"},
    "methods": {"errors"},
    "tuner": {
        "errors",
        "flops",
        "layouts",
        "linearize",
        "loaders",
        "methods",
        "nested",
        "objective",
        "optimizer",
        "schedule",
        "step",
        "streams",
        "tunable",
        "uncentred",
        "verify",
    },
    "step_sizes": set(),
    "diagnosis": {"errors", "patterns", "step", "step_sizes", "tunable", "tuner", "untouched"},
    "export": {"errors", "tunable"},
    "bundle": {
        "diagnosis",
        "errors",
        "export",
        "flops",
        "inventory",
        "loaders",
        "methods",
        "optimizer",
        "plan",
        "schedule",
        "space",
        "step",
        "tunable",
        "tuner",
    },
    "checks": {"errors", "kept", "tunable"},
    "convert": {
        "augment",
        "bundle",
        "checks",
        "compiled",
        "declare",
        "errors",
        "inventory",
        "linearize",
        "loaders",
        "methods",
        "objective",
        "optimizer",
        "plan",
        "planning",
        "response_optimizer",
        "rewrite",
        "schedule",
        "space",
        "streams",
        "targets",
        "trace",
        "tunable",
        "tuner",
    },
    "testing": {
        "bundle",
        "convert",
        "declare",
        "errors",
        "export",
        "layers",
        "layouts",
        "linearize",
        "objective",
        "perturb",
        "rows",
        "step",
        "streams",
        "tunable",
        "verify",
    },
}
"""Room to the rooms it may import, which all stand above it."""

ONLY_IN = {
    "torch.fx": {"trace", "planning", "rewrite", "testing"},
    "torch.autograd.forward_ad": {
        "constants",
        "forward_mode",
        "layers",
        "linearize",
        "testing",
    },
    "matplotlib": {"schedule"},
    "hypothesis": {"testing"},
}
"""Module to the only rooms that may import it."""

LAZY = ("matplotlib", "hypothesis", "sklearn", "timm", "torchvision")
"""Packages ``import stnify`` must not load."""

ROOT = Path(stnify.__file__).parent
ROOMS = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Every module a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def broken_rules(path):
    room = room_of(path)
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == "stnify":
            if len(parts) == 1:
                yield f"{path.name} imports the package root"
            elif parts[1] != room and parts[1] not in MAY_IMPORT[room]:
                yield f"{path.name} imports {parts[1]}"
        for api, rooms in ONLY_IN.items():
            if (module == api or module.startswith(f"{api}.")) and room not in rooms:
                yield f"{path.name} imports {api}"


def test_every_import_is_in_the_table():
    assert {room_of(path) for path in ROOMS} == set(MAY_IMPORT)
    assert [rule for path in ROOMS for rule in broken_rules(path)] == []


def test_the_table_points_one_way():
    seen: set[str] = set()
    for room, others in MAY_IMPORT.items():
        assert others <= seen, f"{room} looks ahead to {others - seen}"
        seen.add(room)


def test_every_permission_is_used():
    used = {
        (room_of(path), module.split(".")[1])
        for path in ROOMS
        for module in imported(path)
        if module.startswith("stnify.")
    }
    granted = {(room, other) for room, others in MAY_IMPORT.items() for other in others}
    assert granted - used == set()


def test_a_forbidden_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "declare.py"
    path.write_text("from stnify.step import x\nimport torch.fx\nimport stnify\n")
    assert set(broken_rules(path)) == {
        "declare.py imports step",
        "declare.py imports the package root",
        "declare.py imports torch.fx",
    }


def test_importing_stnify_loads_nothing_optional():
    code = f"import stnify, sys; print([n for n in {LAZY!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_documented():
    names = [name for name in vars(stnify) if name[0].isupper() or name == "stnify"]
    assert "Dropout" in names
    assert [name for name in names if not getattr(stnify, name).__doc__] == []
