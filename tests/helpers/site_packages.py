"""A site-packages folder without some of the packages that are installed."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path


def site_without(folder: Path, *absent: str) -> Path:
    """Fill `folder` with links to every installed package but `absent`, their metadata with them.

    Neither an import, nor `find_spec`, nor a look at versions finds what is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for entry in Path(place).iterdir():
            package = re.split(r"[-.]", entry.name)[0]
            link = folder / entry.name
            if package not in absent and entry.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(entry)
    return folder
