"""Citations agree with what the modules state themselves."""

from __future__ import annotations

import re

import pytest

from spem.attention import ChannelAttention, list_attention, register_attention
from spem.attention.spec import attention_class, bibtex


def test_entries_and_modules_name_the_same_papers() -> None:
    for name in list_attention():
        entry_and_module_name_the_same_paper(name)


def entry_and_module_name_the_same_paper(name: str) -> None:
    entry, paper = bibtex(name), attention_class(name).paper
    if name == "scale":
        assert entry == f"% scale: {paper}"
        return
    assert re.match(rf"@\w+\{{{name},\n", entry)
    assert entry.count("{") == entry.count("}")
    year = re.search(r"\((\d{4})\)", paper)
    number = re.search(r"arxiv\.org/abs/([\d.]+)", paper)
    assert year is not None
    if number is not None and "references" not in entry:
        assert number[1] in entry
    assert year[1] in entry
    # the first words of the title, without braces and abbreviated ends
    first = re.findall(r"[A-Za-z]+", paper)[:2]
    title = re.search(r"title = \{(.+)\}", entry)
    assert title is not None
    assert re.findall(r"[A-Za-z]+", title[1])[:2] == first or name == "spa"
    assert "author = {" in entry or name == "spa"


def test_a_module_without_an_entry_is_cited_from_its_own_words():
    from spem.attention.spec import _REGISTRY

    class Mine(ChannelAttention):
        pass

    register_attention("mine_cited", paper="My Module (2031), https://example.org/mine")(Mine)
    try:
        assert bibtex("mine_cited") == (
            "@misc{mine_cited,\n  title = {My Module},\n"
            "  year = {2031}, url = {https://example.org/mine}\n}"
        )
    finally:
        del _REGISTRY["mine_cited"]
    with pytest.raises(ValueError, match="unknown attention"):
        bibtex("mine_cited")
