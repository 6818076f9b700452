"""The pages name files, commands and options that exist, and their tables are current."""

from __future__ import annotations

import contextlib
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from spem.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {page.relative_to(ROOT / "docs").as_posix(): page.read_text("utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'--8<-- "([^":]+)"\n')


def test_python_on_a_page_is_an_example_that_is_run() -> None:
    shown: set[str] = set()
    for page, text in TEXTS.items():
        for language, code in BLOCK.findall(text):
            if language == "python":
                found = SNIPPET.fullmatch(code)
                assert found, f"{page}: Python that no test runs:\n{code}"
                assert (ROOT / found[1]).is_file(), f"{page}: {found[1]}"
                shown.add(found[1])
    told = "".join(TEXTS.values())
    for path in (ROOT / "examples").glob("*.py"):
        name = f"examples/{path.name}"
        assert name in shown or name in told, f"no page tells of {name}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == set(TEXTS)


def test_links_lead_to_files() -> None:
    """Those of the site are checked when it is built; these are the README's and the like."""
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text("utf-8")):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{name}: {target}"
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (ROOT / "docs" / page).parent.joinpath(target).exists(), f"{page}: {target}"


def commands() -> list[tuple[str, str]]:
    """The `spem` commands in the code of the pages, continued lines joined."""
    found: list[tuple[str, str]] = []
    for page, text in TEXTS.items():
        for language, code in BLOCK.findall(text):
            if language == "":
                lines = code.replace("\\\n", " ").splitlines()
                found += [(page, line.strip()) for line in lines if line.strip().startswith("spem")]
    return found


def test_commands_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    assert len(commands()) > 8
    for page, line in commands():
        words = line.partition(" #")[0].split()
        name, options = words[1], [word for word in words if word.startswith("--")]
        assert name in COMMANDS, f"{page}: {line}"
        if name not in helps:
            with contextlib.suppress(SystemExit):
                main([name, "--help", "--help-all"])
            helps[name] = capsys.readouterr().out
        for option in options:
            known = re.search(rf"{re.escape(option)}(?![\w-])", helps[name])
            assert known, f"{page}: {line}: {name} has no {option}"


def test_generated_tables_are_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make docs` writes them: the registry's, and those of committed measurements."""
    monkeypatch.setattr("sys.argv", ["docs_tables.py", "--check"])
    runpy.run_path(str(ROOT / ".ci" / "docs_tables.py"), run_name="__main__")
    assert "current" in capsys.readouterr().out


def test_modules_are_told_with_or_without_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = runpy.run_path(str(ROOT / ".ci" / "docs_tables.py"))
    costs = tables["costs_by_name"]
    monkeypatch.setitem(costs.__globals__, "MEASURED", tmp_path)
    assert costs() == {}
    text = tables["modules"]()
    assert "| [`se`](#se) |" in text
    assert text.count("- Measured: not measured") == text.count("### `")
    for part in ("attach", "export"):
        assert "Not measured." in tables[part]()
    header = "attention,way,to_plain,attention_parameters,attention_mflops,depth,batch,device\n"
    rows = "se,composed,1.125,1234,0.678,11,64,cpu\nse,fused,0.9,1234,0.678,11,64,cpu\n"
    rows += "bam,composed,,1,2,11,64,cpu\neca,fused,0.8,1,2,11,64,cpu\n"
    (tmp_path / "family_cpu.csv").write_text(header + rows)
    assert "(ResNet-11, batch 64, CPU): composed" in costs()["se"]["long"]
    assert costs()["eca"]["short"] == "-"
    assert costs()["se"]["short"] == "1.12"
    assert "composed 1.12, fused 0.90; +1,234 parameters, +0.68 MFLOPs" in costs()["se"]["long"]
    assert "bam" not in costs()
    (tmp_path / "family_cpu.csv").write_text(header + rows + "ela,fused,0.8,1,2,29,64,cpu\n")
    with pytest.raises(SystemExit, match="rows of different depth"):
        costs()
    assert "y = x * s(W2 relu(W1 z + b1) + b2)" in tables["formula"]("se")


def test_modules_of_one_size() -> None:
    """As the exporter's own tests have them."""
    text = runpy.run_path(str(ROOT / ".ci" / "docs_tables.py"))["export"]()
    fixed = "`fca`, `ge(form=theta)`, `ge(form=theta_plus)`"
    assert text.startswith(f"Built for maps of one size: {fixed}. All other")


def test_a_resource_of_another_host_is_found(tmp_path: Path) -> None:
    outside = runpy.run_path(str(ROOT / ".ci" / "docs_offline.py"))["outside"]
    (tmp_path / "good.html").write_text(
        '<script src="a.js"></script><link rel="canonical" href="https://a.b/c">'
        '<a href="https://a.b">x</a><img src="data:image/png;base64,//8=">'
    )
    (tmp_path / "good.css").write_text("@import 'b.css'; a { background: url(c.png) }")
    assert list(outside(tmp_path)) == []
    (tmp_path / "bad.html").write_text(
        '<script src="//a.b/c.js"></script><link rel="preconnect" href="https://a.b">'
        '<img srcset="https://a.b/c.png 2x">'
    )
    (tmp_path / "bad.css").write_text('@import "https://a.b/c.css"; b { src: url(http://a.b/f) }')
    assert len(list(outside(tmp_path))) == 5
