"""Checks that the built pages load nothing from elsewhere: no script, style, font, image or frame.

python .ci/docs_offline.py site

Links that a reader may follow are left alone. Style sheets are read too, for @import and url().
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADS = {"src", "srcset", "data", "poster", "action", "background"}
FETCHED_RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload"}
ELSEWHERE = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


class Resources(HTMLParser):
    """The addresses that a browser fetches when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.found += [value for key, value in given.items() if key in LOADS]
        relations = set(given.get("rel", "").lower().split())
        if tag == "link" and relations & FETCHED_RELATIONS:
            self.found.append(given.get("href", ""))


def fetched(path: Path) -> list[str]:
    """What a page or a style sheet fetches."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        return re.findall(r"(?:@import\s+|url\()\s*[\"']?([^\"')\s;]+)", text)
    page = Resources()
    page.feed(text)
    return page.found


def outside(folder: Path) -> Iterator[str]:
    """Every address of another host that the pages of a folder fetch."""
    for path in sorted([*folder.rglob("*.html"), *folder.rglob("*.css")]):
        for address in fetched(path):
            if ELSEWHERE.match(address):
                yield f"{path.relative_to(folder)}: {address}"


def main() -> None:
    folder = Path(sys.argv[1])
    if not (folder / "index.html").is_file():
        sys.exit(f"docs_offline: {folder} holds no site. Build it: make docs")
    if found := list(outside(folder)):
        sys.exit("docs_offline: loaded from elsewhere:\n" + "\n".join(found))
    print(f"{folder}: the pages load nothing from elsewhere")


if __name__ == "__main__":
    main()
