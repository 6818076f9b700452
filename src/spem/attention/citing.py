"""How to cite a registered module: BibTeX, from `references.bib` or from what the module states."""

import re
from functools import cache
from importlib.resources import files

from spem.attention.base import attention_class


def bibtex(name: str) -> str:
    """The BibTeX entry of a registered module's paper, under the module's name as its key.

    A module without an entry in `references.bib` gets one made of its `paper`, without authors.

    Raises:
        ValueError: No module of this name.

    >>> print(bibtex("se").splitlines()[0])
    @misc{se,
    """
    paper = attention_class(name).paper
    entry = _entries().get(name)
    if entry is not None:
        return entry
    match = re.fullmatch(r"(?P<title>.+?) \((?P<year>\d{4})\), (?P<url>https?://\S+)", paper)
    if match is None:
        return f"% {name}: {paper}"
    title, year, url = match["title"], match["year"], match["url"]
    return f"@misc{{{name},\n  title = {{{title}}},\n  year = {{{year}}}, url = {{{url}}}\n}}"


@cache
def _entries() -> dict[str, str]:
    text = files("spem.attention").joinpath("references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in re.split(r"\n(?=@)", text)]
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}
