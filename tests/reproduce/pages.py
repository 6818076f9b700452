"""Reads a report and the CSV files beside it, without the code that wrote them."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Reads a page: its text, ids, links, tables, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        self.addresses += [given[name] for name in ("src", "srcset", "poster") if name in given]
        if tag == "link":
            self.addresses.append(given["href"])
        if tag == "section":
            self.section = given.get("id", "")
            self.tables[self.section] = []
        elif tag == "tr":
            self.tables[self.section].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        elif tag == "small":
            self.tables[self.section][-1][-1] += "; "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1] += data.strip()


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(
    folder: Path, experiment: str, column: str = "accuracy", data: str = "cifar10"
) -> dict[str, dict[int, float]]:
    """Label of a row -> seed -> number, of the planned seeds that have finished."""
    found: dict[str, dict[int, float]] = {}
    runs = [row for row in rows(folder, "runs.csv") if row["status"] == "finished"]
    for plan in rows(folder, "plan.csv"):
        if (plan["experiment"], plan["data"]) == (experiment, data):
            own = [r for r in runs if r["id"] == plan["id"] and r["seed"] in plan["seeds"].split()]
            found[plan["row"]] = {int(row["seed"]): float(row[column]) for row in own}
    return found


def ids(folder: Path, experiment: str, data: str = "cifar10") -> dict[str, str]:
    """Label of a row -> id."""
    plan = rows(folder, "plan.csv")
    return {r["row"]: r["id"] for r in plan if (r["experiment"], r["data"]) == (experiment, data)}


def line(page: Page, table: str, label: str) -> dict[str, str]:
    """Heading -> cell of one row of a table."""
    head, *body = page.tables[f"table-{table}"]
    (found,) = [row for row in body if row[0].split(";")[0] == label]
    return dict(zip(head, found, strict=True))


def plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")
