"""Checks a built site: links and anchors, and every page in headless Chromium.

    make docs && python docs/check_site.py site      # needs playwright and a Chromium
    python docs/check_site.py site --links           # links only, without a browser
    python docs/check_site.py site --browser /usr/bin/chromium --pictures folder

Each page is opened at 1280 and 420 pixels. It fails if a code box is wider than the page or hides
part of its text, if a part of the text or a picture ends outside the window, or if a script raised.
The pictures are screenshots in the light and in the dark mode.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

WIDTHS = (1280, 420)
#: Code boxes that stick out of the window, or whose text is wider than the box.
MEASURE = """() => {
  const width = document.documentElement.clientWidth;
  const found = [];
  for (const box of document.querySelectorAll('.md-content pre, .md-content pre > code')) {
    const area = box.getBoundingClientRect();
    if (area.width === 0) continue;  // a closed block
    if (area.right > width + 1) {
      found.push(`a code box ends at ${Math.round(area.right)} of ${width}`);
    }
    if (box.scrollWidth > box.clientWidth + 1) {
      found.push(`code is ${box.scrollWidth} wide in a box of ${box.clientWidth}: ` +
                 box.innerText.slice(0, 60));
    }
  }
  for (const part of document.querySelectorAll('.md-content__inner > *, .md-content img')) {
    const right = Math.round(part.getBoundingClientRect().right);
    if (right > width + 1) found.push(`<${part.tagName}> ends at ${right} of ${width}`);
  }
  return found;
}"""


class Page(HTMLParser):
    """Links and ids of one HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect href, src and id."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            if value and name in ("id", "name"):
                self.ids.add(value)


def broken_links(site: Path) -> list[str]:
    """Return the links inside the site that lead nowhere, files and anchors."""
    pages = {p.resolve(): Page(p.read_text("utf-8")) for p in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            here = path.relative_to(site.resolve())
            if not place.is_file():
                found.append(f"{here}: {link}: no such file")
            elif anchor and place in pages and unquote(anchor) not in pages[place].ids:
                found.append(f"{here}: {link}: no such anchor")
    return found


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve the folder on this machine and yield its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def open_pages(site: Path, browser: str | None, pictures: Path | None) -> list[str]:
    """Return what is wrong with the pages at each width."""
    from playwright.sync_api import sync_playwright

    program = browser or shutil.which("chromium") or shutil.which("google-chrome")
    found, pages = [], sorted(site.rglob("index.html"))
    with served(site) as address, sync_playwright() as play:
        options: dict[str, Any] = {"args": ["--no-sandbox"]}
        if program is not None:
            options["executable_path"] = program
        chromium = play.chromium.launch(**options)
        for scheme in ("light", "dark") if pictures else ("light",):
            tab = chromium.new_page(color_scheme=scheme)
            errors: list[str] = []
            tab.on("pageerror", lambda e, errors=errors: errors.append(str(e)))
            for path in pages:
                name = path.relative_to(site).parent.as_posix()
                tab.goto(f"{address}/{name}/", wait_until="load")
                tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                for width in WIDTHS:
                    tab.set_viewport_size({"width": width, "height": 900})
                    where = f"{name} at {width}, {scheme}"
                    found += [f"{where}: {problem}" for problem in tab.evaluate(MEASURE)]
                    if pictures is not None:
                        file = f"{name.replace('/', '_')}-{width}-{scheme}.png"
                        tab.screenshot(path=str(pictures / file))
                found += [f"{name}, {scheme}: {e}" for e in errors]
                errors.clear()
            tab.close()
        chromium.close()
    print(f"{len(pages)} pages at {WIDTHS} pixels")
    return found


def main() -> None:
    """Print the problems; the exit status is 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path)
    parser.add_argument("--links", action="store_true", help="check links only")
    parser.add_argument("--browser", help="path of a Chromium")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    if not (options.site / "index.html").is_file():
        parser.error(f"site: expected a built site, found no {options.site}/index.html; make docs")
    found = broken_links(options.site)
    if not options.links:
        found += open_pages(options.site, options.browser, options.pictures)
    print("\n".join(found) or "no problems")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
