"""Imports point down only, and every module lies in a room.

`FLOORS` lists the folders of the package from the bottom up. A module imports from its own folder
and from folders on lower floors; type-only imports (under `if TYPE_CHECKING`) are free.
`THIRD_PARTY` says which folder may import which third-party package.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "lightning_peft": ROOT / "lightning_peft",
    "lightning_peft_kernels": ROOT / "triton_kernels" / "lightning_peft_kernels",
}

# The folders in floor order, bottom first. Rooms on one line are on one floor.
FLOORS: list[tuple[str, ...]] = [
    ("lightning_peft_kernels",),
    ("guideline", "trainers"),
    ("core",),
    ("storage",),
    ("methods", "layers"),
    ("optim", "report", "models"),
    ("initialization", "activations", "losses"),
    ("adapters",),
    ("planner", "checkpoint", "hf", "diagnostics"),
    ("strategies", "recipes"),
    ("callback",),
]
# The modules that may lie outside a folder. Those of lightning_peft stand above all rooms; those of
# the kernel package are what its folders share.
ROOT_MODULES = {
    "lightning_peft": ("__main__", "extend"),
    "lightning_peft_kernels": (
        "autograd",
        "cache_entries",
        "chips",
        "dispatch",
        "launch",
        "malloc",
        "races",
        "registration",
        "verdicts",
    ),
}

# Who may import what, besides the standard library, torch and our own packages.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "lightning": ("strategies",),
    "pytorch_lightning": ("strategies",),
    "lightning_fabric": ("strategies",),
    "typing_extensions": ("callback", "strategies"),
    "triton": ("lightning_peft_kernels",),
    # diagnostics measures against them
    "bitsandbytes": ("storage", "optim", "lightning_peft_kernels", "diagnostics"),
    "peft": ("diagnostics",),
    "transformers": ("models", "layers", "hf", "planner", "storage", "recipes", "diagnostics"),
    "fsspec": ("checkpoint",),  # a dependency of Lightning; shards at an address
    "safetensors": ("hf", "checkpoint", "storage", "recipes"),
    "liger_kernel": ("callback",),
    "matplotlib": ("callback",),
    "numpy": ("methods",),  # UniLoRA draws its places as peft does
    "sklearn": ("methods",),  # AdaMSS finds clusters as peft does
    "rich": ("report", "adapters", "callback", "hf"),
    "huggingface_hub": ("hf", "planner"),
}

# What a file in methods/ may import from our packages; besides, the parent of a true subtype.
METHOD_IMPORTS = (
    "lightning_peft_kernels.autograd",
    "lightning_peft.core.activated",
    "lightning_peft.core.balls",
    "lightning_peft.core.butterfly",
    "lightning_peft.core.circulant",
    "lightning_peft.core.compressed",
    "lightning_peft.core.collectives",  # VeLoRA's direction is that of all processes
    "lightning_peft.core.drawn",
    "lightning_peft.core.edit",
    "lightning_peft.core.granular",
    "lightning_peft.core.hard_concrete",
    "lightning_peft.core.input_dtype",
    "lightning_peft.core.mixtures",
    "lightning_peft.core.name_patterns",
    "lightning_peft.core.names",
    "lightning_peft.core.projection",
    "lightning_peft.core.protocols",
    "lightning_peft.core.replaced_rows",
    "lightning_peft.core.rotation",
    "lightning_peft.core.site",
    "lightning_peft.core.skew",
    "lightning_peft.core.sparse",
    "lightning_peft.core.terms",
    "lightning_peft.core.tiled",
    "lightning_peft.core.vectors",
    "lightning_peft.core.wavelets",
    "lightning_peft.methods.base",
    "lightning_peft.methods.adalora_importance",
    "lightning_peft.methods.bottleneck_layers",
    "lightning_peft.methods.checks",
    "lightning_peft.methods.cpt_loss",
    "lightning_peft.methods.exchange",
    "lightning_peft.methods.limits",
    "lightning_peft.methods.lora_checks",  # LoRA's arguments
    "lightning_peft.methods.lora_gradients",  # LoRA's changes of its gradients
    "lightning_peft.methods.lora_start",  # LoRA's initialisations
    "lightning_peft.methods.lycoris",
    "lightning_peft.methods.registry",
    "lightning_peft.methods.row_clusters",
    "lightning_peft.methods.site_rules",
    "lightning_peft.methods.tensors",
    "lightning_peft.methods.tasks",  # task ids of the batch
    "lightning_peft.methods.text_start",
    "lightning_peft.methods.token_indices",
    "lightning_peft.methods.triplets",
)


@dataclass(frozen=True)
class Import:
    """One import statement of one of our modules."""

    module: str  # dotted name of the importing module
    path: Path
    line: int
    target: str  # dotted name of what is imported
    names: tuple[str, ...]  # of a `from` import
    type_only: bool

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def room(module: str) -> str:
    """Name of the folder a module lies in; "" for the modules at the root of lightning_peft."""
    package, _, inside = module.partition(".")
    if package != "lightning_peft":
        return package
    return (
        inside.partition(".")[0] if (PACKAGES[package] / inside.partition(".")[0]).is_dir() else ""
    )


def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(tree: ast.AST, type_only: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements at any depth, and whether they run for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, type_only
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.body:
                yield from statements(ast.Module([part], []), True)
            for part in node.orelse:
                yield from statements(ast.Module([part], []), type_only)
        else:
            yield from statements(node, type_only)


def imports_in(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, type_only in statements(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, path, node.lineno, alias.name, (), type_only)
            continue
        assert isinstance(node, ast.ImportFrom)
        base = node.module or ""
        if node.level:
            above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = f"{above}.{base}".rstrip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}"  # `from lightning_peft.storage import bnb` is a module
            target, names = (inner, ()) if inner in known else (base, (alias.name,))
            yield Import(module, path, node.lineno, target, names, type_only)


MODULES = modules()
IMPORTS = [found for name, path in MODULES.items() for found in imports_in(name, path, MODULES)]
OURS = [i for i in IMPORTS if i.top in PACKAGES and not i.type_only]


def floor(name: str) -> int:
    """Floor of a room; the modules at the root stand above all rooms."""
    if not name:
        return len(FLOORS)
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def check(broken: list[str]) -> None:
    if broken:
        pytest.fail("\n" + "\n".join(broken), pytrace=False)


def misplaced(modules: Collection[str]) -> list[str]:
    """Loose modules, and folders that FLOORS and the tree do not share."""
    listed = {name for rooms in FLOORS for name in rooms}
    broken = []
    for module in modules:
        name = room(module)
        package, _, inside = module.partition(".")
        top = inside.partition(".")[0]
        is_folder = (PACKAGES[package] / top).is_dir()
        if not is_folder and top not in ROOT_MODULES[package]:
            broken.append(f"{module}: a loose module; move it into a folder")
        elif name and name not in listed:
            broken.append(f"{module}: the folder {name!r} is not in FLOORS")
    found = {room(module) for module in modules} - {""}
    broken += [f"FLOORS: the folder {name!r} does not exist" for name in sorted(listed - found)]
    return broken


def test_every_folder_has_a_floor_and_no_module_is_loose() -> None:
    check(misplaced(MODULES))


def pointing_up(imports: Iterable[Import]) -> list[str]:
    broken = []
    for found in imports:
        here, there = room(found.module), room(found.target)
        if here == there or floor(there) < floor(here):
            continue
        where = "on the same floor" if floor(there) == floor(here) else "above it"
        broken.append(
            f"{found.place}: {found.module} imports {found.target}, which is {where}; move what is "
            "needed to a lower room"
        )
    return broken


def test_imports_point_down() -> None:
    check(pointing_up(OURS))


def cycles(edges: Mapping[str, set[str]]) -> list[str]:
    """The first cycle found from each module, as a chain of names."""
    found: list[str] = []
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
            return
        if module in done:
            return
        for target in sorted(edges[module]):
            walk(target, (*trail, module))
        done.add(module)

    for module in edges:
        walk(module, ())
    return found


def test_no_import_cycles() -> None:
    """Inside one room the table says nothing; with a cycle the order of imports would count."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in OURS:
        # A package's __init__ gathers its own modules, which may name the package's base types.
        if found.target in MODULES and MODULES[found.module].name != "__init__.py":
            edges[found.module].add(found.target)
    check(cycles(edges))


def test_no_cycles_between_folders() -> None:
    """No two rooms import each other, directly or through others."""
    edges: dict[str, set[str]] = {}
    for found in OURS:
        here, there = room(found.module), room(found.target)
        edges.setdefault(here, set())
        edges.setdefault(there, set())
        if here != there:
            edges[here].add(there)
    check(cycles(edges))


@pytest.mark.parametrize("module", ["lightning_peft.merging", "lightning_peft_kernels.merging"])
def test_a_loose_module_is_seen(module: str) -> None:
    (message,) = misplaced([*MODULES, module])
    assert message == f"{module}: a loose module; move it into a folder"


def test_a_folder_without_a_floor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    without = [tuple(name for name in rooms if name != "report") for rooms in FLOORS]
    monkeypatch.setattr(sys.modules[__name__], "FLOORS", without)
    assert any("the folder 'report' is not in FLOORS" in line for line in misplaced(MODULES))


@pytest.mark.parametrize(
    ("module", "target", "where"),
    [
        ("lightning_peft.core.edit", "lightning_peft.adapters.merge", "above it"),
        ("lightning_peft.optim.convert", "lightning_peft.report.summary", "on the same floor"),
        ("lightning_peft_kernels.dispatch", "lightning_peft.core.edit", "above it"),
    ],
)
def test_an_import_that_does_not_point_down_is_seen(module: str, target: str, where: str) -> None:
    (message,) = pointing_up([Import(module, Path(ROOT, "m.py"), 3, target, (), False)])
    assert message.startswith(f"m.py:3: {module} imports {target}, which is {where}")


def test_a_cycle_is_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert cycles(edges) == ["b -> c -> b"]


def test_third_parties_stay_in_their_rooms() -> None:
    broken = []
    for found in IMPORTS:
        top = found.top
        if found.type_only or top in PACKAGES or top == "torch" or top in sys.stdlib_module_names:
            continue
        allowed = THIRD_PARTY.get(top)
        if allowed is None:
            broken.append(f"{found.place}: {found.module} imports {top}, which no room may")
        elif room(found.module) not in allowed:
            broken.append(
                f"{found.place}: {found.module} imports {top}, which only {', '.join(allowed)} may"
            )
    check(broken)


def bases_in(path: Path) -> set[str]:
    tree = parsed(path)
    return {
        ast.unparse(base).rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }


# Files of methods/ that define no method of their own.
NO_METHODS = (
    "adalora_importance",
    "argument_messages",
    "arguments",
    "bottleneck_layers",
    "checks",
    "cpt_loss",
    "exchange",
    "hybrids",
    "limits",
    "lora_checks",
    "lora_data_start",
    "lora_gradients",
    "lora_init",
    "lora_options",
    "lora_start",
    "lycoris",
    "method_lists",
    "refused",
    "registry",
    "row_clusters",
    "site_rules",
    "tensors",
    "text_start",
    "token_indices",
    "triplets",
)


def test_a_method_knows_only_edits() -> None:
    """A method imports METHOD_IMPORTS, and another method only to derive from its class."""
    broken = []
    for found in OURS:
        if room(found.module) != "methods" or found.module == "lightning_peft.methods":
            continue
        if found.module.startswith(
            ("lightning_peft.methods.base", "lightning_peft.methods.formats")
        ):
            continue
        if found.path.stem in NO_METHODS or found.target in METHOD_IMPORTS:
            continue
        if found.target.startswith("lightning_peft.methods.formats"):  # the method's table
            continue
        subtype = room(found.target) == "methods" and bases_in(found.path) & set(found.names)
        if not subtype:
            broken.append(
                f"{found.place}: {found.module} imports {found.target}; a method imports "
                f"{', '.join(METHOD_IMPORTS)}, and another method only to derive from its class"
            )
    check(broken)


#: Methods with more options than fit → the most lines their files may have.
LONG_METHODS = {"lora": 230, "adalora": 160, "diff_pruning": 125}


def test_a_method_file_is_short() -> None:
    """What many methods share, and what has a meaning of its own, lies in a file of its own."""
    long = []
    for path in (PACKAGES["lightning_peft"] / "methods").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        lines, most = len(source.splitlines()), LONG_METHODS.get(path.stem, 119)
        if "\n@register\n" in source and lines > most:
            long.append(f"{path.name}: expected at most {most} lines, found {lines}")
    check(long)


@pytest.mark.parametrize(
    ("source", "target", "type_only"),
    [
        (
            "from lightning_peft.storage import bitsandbytes",
            "lightning_peft.storage.bitsandbytes",
            False,
        ),
        ("from lightning_peft.storage import Quantization", "lightning_peft.storage", False),
        ("def f():\n    from . import attach", "lightning_peft.adapters.attach", False),
        ("from ..core.edit import Edit", "lightning_peft.core.edit", False),
        ("if TYPE_CHECKING:\n    import bitsandbytes.nn", "bitsandbytes.nn", True),
    ],
)
def test_the_reader_sees(source: str, target: str, type_only: bool, tmp_path: Path) -> None:
    module = "lightning_peft.layers.probe" if ".." in source else "lightning_peft.adapters.probe"
    path = tmp_path / "probe.py"
    path.write_text(source)
    (found,) = imports_in(module, path, MODULES)
    assert (found.target, found.type_only) == (target, type_only)


#: Files that derive classes from transformers', or that only those import; they are imported when
#: such a model is adapted.
DERIVES = (
    "lightning_peft.hf.packed_conversions",
    "lightning_peft.hf.packed_quantizer",
    "lightning_peft.layers.prompt.prefix_cache",
    "lightning_peft.models.plain_saver",
)


def test_extras_are_imported_where_they_are_used() -> None:
    """A module that imports an extra at its top fails where the extra is not installed."""
    extras = ("transformers", "bitsandbytes", "torchmetrics", "huggingface_hub")
    found = []
    for module, path in MODULES.items():
        for node in parsed(path).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names}
            if tops & set(extras) and module not in DERIVES:
                found.append(f"{module}:{node.lineno}")
    assert found == []
