"""MkDocs hook: a line `<!-- reference: NAME -->` becomes reference entries made from the package.

`methods` lists every method with all arguments, inherited ones included. The other names are groups
of functions and classes. A public name that no group has goes to `more`, so none is ever missing.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "lightning_peft"

#: Group → public names, in the order in which a user meets them.
GROUPS: dict[str, tuple[str, ...]] = {
    "trainer": (
        *("PEFT", "AdapterMonitor", "PEFTDDPStrategy", "PEFTFSDPStrategy"),
        *("register_strategies", "load_from_checkpoint"),
    ),
    "attach": (
        *(
            "attach",
            "quantize",
            "Quantization",
            "load_packed",
            "detach",
            "set_adapter",
            "disable_adapters",
        ),
        *("use_adapters", "adapter_names", "combine", "reset_adapters", "start_from_data"),
        "hard_prompt_ids",
    ),
    "files": (
        *("save_adapter", "load_adapter", "adapter_state_dict", "load_adapter_state_dict"),
        *("save_checkpoint", "load_checkpoint"),
    ),
    "merge": (
        *("merge", "unmerge", "merge_and_unload", "MergeReport", "export_merged"),
        "ExportReport",
    ),
    "loop": ("convert_optimizer", "MethodHooks"),
    "plan": (
        *("estimate_memory", "Plan", "recommend", "Recommendation", "parameter_report", "Report"),
        "tokens_per_expert",
    ),
    "recipes": ("extract_lora", "ExtractReport", "prune_rank", "PruneReport"),
}

#: Classes whose public methods are hooks that the Trainer calls: their arguments are the reference.
WITHOUT_MEMBERS = {"PEFT", "AdapterMonitor", "PEFTDDPStrategy", "PEFTFSDPStrategy"}

ORIGIN = re.compile(r"arXiv:\d{4}\.\d{4,5}")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the entries of the page."""
    return re.sub(r"^<!-- reference: (\w+) -->$", lambda m: entries(m[1]), markdown, flags=re.M)


def entries(group: str) -> str:
    """Return the Markdown of a group."""
    if group == "methods":
        return "\n\n".join(map(method_entry, methods()))
    places = locations()
    if group == "more":
        known = {name for names in GROUPS.values() for name in names}
        known |= {cls.__name__ for cls in methods()}
        names = [n for n in public_names() if n not in known]
    else:
        names = [n for n in GROUPS[group] if n in places]
    return "\n\n".join(directive(n, places[n]) for n in names if n in places) or "None."


def public_names() -> list[str]:
    """Return `__all__` of the package."""
    import lightning_peft

    return list(lightning_peft.__all__)


def locations() -> dict[str, str]:
    """Return the dotted path that each public name is imported from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_peft"):
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return {n: found[n] for n in public_names() if n in found}


def directive(name: str, path: str) -> str:
    """Return the mkdocstrings directive of a name."""
    lines = [f"::: {path}", "    options:", "      heading_level: 3"]
    if name in WITHOUT_MEMBERS:
        lines.append("      members: false")
    return "\n".join(lines)


# ---- methods


def methods() -> list[type[Any]]:
    """Return the public methods by name."""
    import lightning_peft
    from lightning_peft.methods.registry import METHODS

    ours = [c for c in METHODS.values() if c.__name__ in lightning_peft.__all__]
    return sorted(ours, key=lambda c: c.__name__.lower())


def method_entry(cls: type[Any]) -> str:
    """Return a method's heading, its description and the table of its arguments."""
    import sys

    text = (cls.__doc__ or "").partition("\n\n    Attributes:")[0].partition("\n\n    Raises:")[0]
    module = sys.modules[cls.__module__].__doc__ or ""
    papers = list(dict.fromkeys(ORIGIN.findall(module)))
    links = ", ".join(f"[{p}](https://arxiv.org/abs/{p[6:]})" for p in papers)
    parts = [f"## {cls.__name__}", _paragraphs(text)]
    if links:
        parts.append(f"Paper: {links}.")
    rows = ["| argument | default | meaning |", "| :--- | :--- | :--- |"]
    described = descriptions(cls)
    own = [f for f in dataclasses.fields(cls) if f.init]
    for field in sorted(own, key=lambda f: f.kw_only):  # the targets, which all methods have, last
        meaning = described.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{default(field)}` | {meaning} |")
    return "\n\n".join([*parts, "\n".join(rows)])


def default(field: dataclasses.Field[Any]) -> str:
    """Return the default as it is written in code."""
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def descriptions(cls: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a class and of its bases say of each argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(
            r"^    (?:Attributes|Args):\n(.*?)(?=^    \w+:\n|\Z)", base.__doc__ or "", re.M | re.S
        )
        if section is None:
            continue
        for entry in re.split(r"\n(?=        \w)", section[1].rstrip()):
            name, _, meaning = entry.strip().partition(":")
            for one in name.split(","):
                if not (one.strip() in found and meaning.strip().startswith("As for")):
                    found[one.strip()] = _code(" ".join(meaning.split()))
    return found


def _paragraphs(text: str) -> str:
    return _code("\n\n".join(" ".join(p.split()) for p in text.strip().split("\n\n")))


def _code(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text)
