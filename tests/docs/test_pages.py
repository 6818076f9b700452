"""README and pages name files, commands and options that exist, and show what is current."""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from spem.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'--8<-- "([^":]+)"\n')
TABLES = runpy.run_path(str(ROOT / ".ci" / "docs_tables.py"))


def test_python_on_a_page_is_an_example_that_is_run() -> None:
    shown: set[str] = set()
    for page, text in TEXTS.items():
        for language, code in BLOCK.findall(text):
            if language == "python":
                found = SNIPPET.fullmatch(code)
                assert found, f"{page}: Python that no test runs:\n{code}"
                shown.add(found[1])
    assert shown == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}


def test_python_of_the_readme_runs() -> None:
    pytest.importorskip("torchvision")
    names: dict[str, object] = {}
    blocks = [code for language, code in BLOCK.findall(README) if language == "python"]
    assert len(blocks) >= 2
    for code in blocks:
        exec(code.replace('weights="DEFAULT"', "weights=None"), names)


def test_the_readme_is_short_and_its_tables_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(README.splitlines()) <= 150
    monkeypatch.setattr("sys.argv", ["docs_tables.py", "--check"])
    TABLES["main"]()
    assert "current" in capsys.readouterr().out


def test_every_generated_part_is_made() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"generated: (\w+)", text)}
    assert named == set(TABLES["PARTS"])
    for make in TABLES["PARTS"].values():
        assert "|" in make()
    text = TABLES["on_page_markdown"]("a\n<!-- generated: gpu -->\nb")
    assert text.startswith("a\n| depth | module |")
    assert text.endswith("|\nb")


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {f"docs/{name}" for name in listed} == set(TEXTS)


def test_every_page_says_first_what_it_is_for() -> None:
    for page, text in TEXTS.items():
        if "reference/" not in page:
            assert text.split("\n\n")[1].startswith("After this page you"), page


def test_links_of_the_readme_lead_to_files() -> None:
    """Those of the site are checked when it is built."""
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{name}: {target}"


def commands() -> list[tuple[str, str]]:
    """The `spem` commands in README and pages, continued lines joined."""
    found: list[tuple[str, str]] = []
    for page, text in {**TEXTS, "README.md": README}.items():
        for language, code in BLOCK.findall(text):
            if language == "":
                lines = code.replace("\\\n", " ").splitlines()
                found += [(page, line.strip()) for line in lines if line.strip().startswith("spem")]
        inline = re.findall(r"`(spem [a-z]+(?: [^`]*)?)`", text)
        found += [(page, " ".join(line.split())) for line in inline]
    return found


def test_commands_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    assert len(commands()) > 20
    for page, line in commands():
        words = shlex.split(line, comments=True)
        name, options = words[1], [word for word in words if word.startswith("--")]
        assert name in COMMANDS, f"{page}: {line}"
        if name not in helps:
            with contextlib.suppress(SystemExit):
                main([name, "--help-all"])
            helps[name] = capsys.readouterr().out
        for option in options:
            known = re.search(rf"{re.escape(option)}(?![\w-])", helps[name])
            assert known, f"{page}: {line}: {name} has no {option}"


OUTPUT = re.compile(r"```\n(spem [^\n]*)\n```\n\n```\{ \.text \.output \}\n(.*?)```", re.DOTALL)


def test_shown_output_of_attach_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    found = dict(OUTPUT.findall(TEXTS["docs/insert.md"]))
    line = "spem attach resnet18 spem --dry-run"
    assert main(line.split()[1:]) == 0
    assert capsys.readouterr().out.startswith(found[line])


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
