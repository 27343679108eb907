"""Imports point down only.

`ROOMS` lists the modules from the bottom up. A module imports from rooms below its own and from its
own room; type-only imports (under `if TYPE_CHECKING`) are free. `THIRD_PARTY` says who may import
what from outside; anything not listed there is the standard library and torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "lightning_peft": ROOT / "lightning_peft",
    "lightning_peft_kernels": ROOT / "triton_kernels" / "lightning_peft_kernels",
}

# Bottom first. A name is a pattern for dotted module paths; "lightning_peft." is left out. Each
# inner tuple is one room; rooms on one line stand side by side and may not import each other.
ROOMS: list[list[tuple[str, ...]]] = [
    [("lightning_peft_kernels", "lightning_peft_kernels.*")],
    [("edit", "masked", "site", "swap")],
    [("storage", "storage.*"), ("layers", "layers.*")],
    [("methods", "methods.*")],
    [("record", "batches", "fingerprint", "targets", "architectures", "blocks", "nearest")],
    [("report", "report.*")],
    [
        (
            *("active", "making", "placing", "placing.*", "quantizing", "adapter_state", "prompts"),
            *("starts", "starts.*"),
        ),
    ],
    [("attach",), ("merge", "merge_*"), ("liger",)],
    [("combine",)],
    [
        ("checkpoint", "checkpoint.*"),
        ("hf", "hf.*"),
        ("planner", "planner.*", "__main__"),
        ("optim", "optim.*"),
    ],
    [("extract", "extract.*", "recipes", "recipes.*")],
    [("callback", "callback.*", "strategies", "strategies.*", "loading")],
    [("",)],  # lightning_peft/__init__.py: public names only
]

# Who may import what, besides the standard library, torch and our own packages.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "lightning": ("callback", "callback.*", "strategies", "strategies.*", "loading"),
    "triton": ("lightning_peft_kernels.*",),
    "bitsandbytes": ("storage.bnb", "optim", "optim.*", "lightning_peft_kernels.nf4*"),
    "transformers": (
        "targets",
        "layers",
        "layers.*",
        "hf",
        "hf.*",
        "planner.*",
        "storage.stream",
        "extract.*",
    ),
    "safetensors": (*("hf", "hf.*", "checkpoint", "checkpoint.*", "storage.stream", "extract.*"),),
    "liger_kernel": ("liger",),
    "rich": ("report", "report.*", "quantizing", "callback", "callback.*"),
}

# What a file in methods/ may import from our packages; besides, the parent of a true subtype.
METHOD_IMPORTS = (
    "lightning_peft.edit",
    "lightning_peft.site",
    "lightning_peft.methods.base",
    "lightning_peft.methods.hf_format",
    "lightning_peft.methods.lora_hf",  # functions of LoRA's exchange table, and of its subtypes
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


def short(module: str) -> str:
    """The name that the tables use."""
    return module.removeprefix("lightning_peft").removeprefix(".") if is_main(module) else module


def is_main(module: str) -> bool:
    return module == "lightning_peft" or module.startswith("lightning_peft.")


def fits(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(short(module), pattern) for pattern in patterns)


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
    for node, type_only in statements(ast.parse(path.read_text(encoding="utf-8"))):
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


def room_of(module: str) -> tuple[int, int]:
    """(floor, room on that floor); kernels' names are written out in full in the table."""
    for level, side_by_side in enumerate(ROOMS):
        for index, patterns in enumerate(side_by_side):
            if fits(module, patterns):
                return level, index
    raise LookupError(module)


def check(broken: list[str]) -> None:
    if broken:
        pytest.fail("\n" + "\n".join(broken), pytrace=False)


def test_every_module_has_a_room() -> None:
    broken = []
    for module, path in MODULES.items():
        try:
            room_of(module)
        except LookupError:
            broken.append(f"{path.relative_to(ROOT)}: {module} is in no room; add it to ROOMS")
    check(broken)


def test_imports_point_down() -> None:
    broken = []
    for found in OURS:
        here, there = room_of(found.module), room_of(found.target)
        if there[0] < here[0] or there == here:
            continue
        side = "beside" if there[0] == here[0] else "above"
        broken.append(
            f"{found.place}: {found.module} imports {found.target}, which stands {side} it; move "
            "what is needed to a lower room"
        )
    check(broken)


def test_no_import_cycles() -> None:
    """Inside one room the table says nothing; with a cycle the order of imports would count."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in OURS:
        # A package's __init__ gathers its own modules, which may name the package's base types.
        if found.target in MODULES and MODULES[found.module].name != "__init__.py":
            edges[found.module].add(found.target)
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            pytest.fail(" -> ".join((*trail[trail.index(module) :], module)), pytrace=False)
        if module in done:
            return
        for target in sorted(edges[module]):
            walk(target, (*trail, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


def test_third_parties_stay_in_their_rooms() -> None:
    broken = []
    for found in IMPORTS:
        top = found.top
        if found.type_only or top in PACKAGES or top == "torch" or top in sys.stdlib_module_names:
            continue
        allowed = THIRD_PARTY.get(top)
        if allowed is None:
            broken.append(f"{found.place}: {found.module} imports {top}, which no room may")
        elif not fits(found.module, allowed):
            broken.append(
                f"{found.place}: {found.module} imports {top}, which only {', '.join(allowed)} may"
            )
    check(broken)


def bases_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        ast.unparse(base).rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }


# Files of methods/ that define no method: what all share, lists of methods, the guideline.
NO_METHODS = (
    *("methods.base", "methods.hybrid_mam", "methods.hybrid_unipelt"),
    *("methods.guideline", "methods.measured"),
)


def test_a_method_knows_only_edits() -> None:
    """methods/x.py: `edit`, `site`, `methods.base`, and a method whose class it derives from."""
    broken = []
    for found in OURS:
        if not fits(found.module, ("methods.*",)) or fits(found.module, NO_METHODS):
            continue
        if found.target in METHOD_IMPORTS:
            continue
        subtype = fits(found.target, ("methods.*",)) and bases_in(found.path) & set(found.names)
        if not subtype:
            broken.append(
                f"{found.place}: {found.module} imports {found.target}; a method imports "
                f"{', '.join(METHOD_IMPORTS)}, and another method only to derive from its class"
            )
    check(broken)


@pytest.mark.parametrize(
    ("source", "target", "type_only"),
    [
        ("from lightning_peft.storage import bnb", "lightning_peft.storage.bnb", False),
        ("from lightning_peft.storage import Quantization", "lightning_peft.storage", False),
        ("def f():\n    from . import attach", "lightning_peft.attach", False),
        ("from ..edit import Edit", "lightning_peft.edit", False),
        ("if TYPE_CHECKING:\n    import bitsandbytes.nn", "bitsandbytes.nn", True),
    ],
)
def test_the_reader_sees(source: str, target: str, type_only: bool, tmp_path: Path) -> None:
    module = "lightning_peft.layers.probe" if ".." in source else "lightning_peft.probe"
    path = tmp_path / "probe.py"
    path.write_text(source)
    (found,) = imports_in(module, path, MODULES)
    assert (found.target, found.type_only) == (target, type_only)
