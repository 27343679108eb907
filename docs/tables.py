"""MkDocs hook: a line `<!-- table: NAME -->` becomes a table made from the numbers' own files, and
`# include PATH` in a code block becomes that file.

No number of a benchmark is typed into a page by hand; where its file is missing the page says so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import package_tables
import result_tables
from table_format import RESULTS, ROOT


def on_config(config: Any) -> Any:
    """Show the version, and the edit links if the repository is set."""
    source = (ROOT / "lightning_peft" / "__init__.py").read_text("utf-8")
    (number,) = re.findall(r'^__version__ = "(.+?)"', source, re.M)
    config.copyright = f"lightning_peft {number}"
    config.edit_uri = "edit/main/docs/" if config.repo_url else None
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Put the benchmarks' CSV files next to the pages, under data/."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.csv")):
        files.append(File.generated(config, f"data/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the page's tables and included files."""
    markdown = re.sub(r"^( *)# include ([\w./-]+)$", _included, markdown, flags=re.M)
    return re.sub(r"^<!-- table: (\w+) -->$", lambda m: TABLES[m[1]](), markdown, flags=re.M)


def _included(match: re.Match[str]) -> str:
    return textwrap.indent((ROOT / match[2]).read_text("utf-8").rstrip(), match[1])


TABLES: dict[str, Callable[[], str]] = {
    name: getattr(module, name)
    for module in (package_tables, result_tables)
    for name in module.__all__
}
