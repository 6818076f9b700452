"""`spem list`: what it says of every module."""

from __future__ import annotations

import json
import re
import sys

import pytest

import spem
from spem.cli import main
from spem.cli.listing import markdown_table
from spem.cli.output import print_table


def test_every_module_has_a_row_with_its_paper() -> None:
    rows = [line.strip("| ").split(" | ") for line in markdown_table().splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == spem.list_attention()
    by_name = {row[0].strip("`"): row[1:] for row in rows}
    assert by_name["sk"] == [
        "[Selective Kernel Networks (2019)](https://arxiv.org/abs/1903.06586)",
        "no",
    ]
    assert by_name["se"][1] == "yes"
    assert by_name["scale"][0].startswith("A control")


def test_which_modules_run_fused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    modules = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    fused = {name for name, facts in modules.items() if facts["fusable"]}
    assert fused == {
        *("spem", "se", "eca", "srm", "scale"),
        *("gct", "ese", "ge", "dia", "ean"),
    }
    for name in fused:
        assert spem.create_attention(name, 64).why_composed() is None
    assert main(["list", "[gs]*"]) == 0
    shown = capsys.readouterr().out.splitlines()
    column = shown[0].index("fused")
    cells = {line.split()[0]: line[column:].split()[0] for line in shown[1:8]}
    assert cells["gct"] == "yes"
    assert cells["gsop"] == cells["sge"] == "no"


def test_it_says_where_a_module_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    places = {m["name"]: m["place"] for m in json.loads(capsys.readouterr().out)}
    assert "after every stage but the last" in places["bam"]
    assert "in place of every norm" in places["iebn"]
    assert "in place of the 3x3 convolution" in places["sk"]
    assert places["ean"] == places["dia"] == f"{places['se']}, one for all blocks of a stage"
    assert places["se"] == "after the last norm of every block"


def test_the_table_of_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "e?a", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == markdown_table("e?a")
    assert len(markdown_table("e?a").splitlines()) == 2 + len(spem.list_attention("e?a"))
    with pytest.raises(ValueError, match="zz"):
        markdown_table("zz")
    assert main(["list", "e?a", "--bibtex"]) == 0
    assert re.findall(r"^@\w+{(\w+),", capsys.readouterr().out, re.M) == ["eca", "ela"]


@pytest.mark.parametrize("name", ["spem, start=identity", "\u732b\u72d7" * 10])
@pytest.mark.parametrize("columns", [40, 72, 73, 80, 120])
def test_no_cell_of_a_table_is_cut_on_a_terminal(
    columns: int, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    names = ["module", "mean", "95 % interval", "verdict"]
    cells = [[name, "78.53", "[-0.42, +0.55]", "no difference shown"]]
    print_table(names, cells, title="a title")
    told = capsys.readouterr().out
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", told).splitlines()]
    assert max(map(len, lines)) <= columns
    words = " ".join(" ".join(lines).split())
    assert all(cell in words for cell in ["a title", *names[1:], *cells[0]])
