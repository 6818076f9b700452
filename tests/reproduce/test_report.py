"""The report says what its CSV files hold: numbers, gaps and letters that hurt; twice the same."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reproduce.folders import NASTY, PAPER, everything
from reproduce.pages import Page, cells, ids, line, plain, rows
from scipy import stats as scipy_stats

from spem.reproduce.report import build_report
from spem.reproduce.report.differences import DIFFERENCES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = everything(tmp_path_factory.mktemp("results"))
    build_report(out)
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_file_is_there(folder: Path) -> None:
    experiments = {row["experiment"] for row in rows(folder, "plan.csv")}
    assert {path.stem for path in (folder / "tables").glob("*.tex")} == experiments
    assert {path.stem for path in (folder / "tables").glob("*.csv")} == experiments
    names = {path.name for path in (folder / "figures").glob("*.pdf")}
    for start in ("lambda-figure2", "depth", "curves-table1", "lambda-", "magnitude-", "cost-time"):
        assert any(name.startswith(start) for name in names), start
    for start in ("gates-", "gradients-11", "penalty-magnitude", "controls-minus", "table1-minus"):
        assert any(name.startswith(start) for name in names), start
    assert all((folder / "figures" / name).read_bytes().startswith(b"%PDF") for name in names)


def test_twice_the_same_bytes(folder: Path) -> None:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    (folder / "figures" / "of-before.pdf").write_bytes(b"an older report's")
    build_report(folder)
    after = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert after == paths
    assert [path.name for path in paths if path.read_bytes() != before[path]] == []


def test_means_deviations_and_differences(folder: Path, page: Page) -> None:
    last, best = cells(folder, "table1"), cells(folder, "table1", "best_accuracy")
    for label in ("SE", "ECA", "SPEM"):
        own, base = last[label], last["plain"]
        found = line(page, "table1-cifar10", label)
        mean, sd = statistics.mean(own.values()), statistics.stdev(own.values())
        low, high = scipy_stats.ttest_1samp(list(own.values()), 0).confidence_interval(0.95)
        assert found["last epoch"] == f"{mean:.2f} ± {sd:.2f} (3); [{low:.2f}, {high:.2f}]"
        top = list(best[label].values())
        assert found["best epoch"].startswith(f"{statistics.mean(top):.2f} ± ")
        pairs = [own[seed] - base[seed] for seed in (0, 1, 2)]
        test = scipy_stats.ttest_1samp(pairs, 0)
        low, high = test.confidence_interval(0.95)
        shown = plain(found["\N{MINUS SIGN} plain"])
        wanted = (
            f"{statistics.mean(pairs):+.2f} [{low:+.2f}, {high:+.2f}]; n 3, p {test.pvalue:.3f}"
        )
        assert shown.startswith(wanted)
        assert found["paper"] == f"{PAPER[label.lower()][1]:.2f}"
        assert found["parameters, paper"] == f"{PAPER[label.lower()][0]:.2f} M"


def test_tables_without_plain_and_se_are_compared_with_those_of_table1(
    folder: Path, page: Page
) -> None:
    """By hand: the runs of Table 1 with the same seeds."""
    first, own = cells(folder, "table1"), cells(folder, "table3")["lambda = 0.3"]
    found = line(page, "table3-cifar10", "lambda = 0.3")
    for label in ("plain", "SE"):
        mean = statistics.mean(own[seed] - first[label][seed] for seed in (0, 1, 2))
        assert plain(found[f"\N{MINUS SIGN} {label}"]).startswith(f"{mean:+.2f} [")
    figure = line(page, "figure2-cifar10", "lambda = 0.3")
    assert "\N{MINUS SIGN} SE" not in figure  # it is the average pooling of this figure
    assert "\N{MINUS SIGN} plain" in figure
    assert "\N{MINUS SIGN} SE" not in line(page, "penalty-cifar10", "penalty 0")


def test_holm_within_the_table(folder: Path) -> None:
    """By its definition, step by step, over the lines compared with plain."""
    lines = rows(folder, "tables/table1.csv")
    lines = [one for one in lines if one["data"] == "cifar10" and one["minus plain: p"]]
    p = sorted((float(one["minus plain: p"]), one["row"]) for one in lines)
    assert len(p) == 4  # SE, CBAM of two seeds, ECA and SPEM
    adjusted: dict[str, float] = {}
    largest = 0.0
    for k, (value, row) in enumerate(p):
        largest = max(largest, min(1.0, value * (len(p) - k)))
        adjusted[row] = largest
    for one in lines:
        assert float(one["minus plain: p_holm"]) == pytest.approx(adjusted[one["row"]], rel=1e-5)


def test_gaps_are_named(folder: Path, page: Page) -> None:
    assert line(page, "table1-cifar10", "SGE")["last epoch"] == "not run"
    last = line(page, "table1-cifar10", "CBAM")["last epoch"].split("; ")
    assert last[0].endswith("(2)")
    assert last[2] == "1 diverged"
    srm = line(page, "table1-cifar10", "SRM")
    assert srm["last epoch"].endswith("(1); 2 not run")
    assert "n too small" in srm["\N{MINUS SIGN} plain"]
    assert srm["verdict"].startswith("n too small to say")
    assert line(page, "table4-cifar10", "the paper's (b)")["last epoch"] == "not run"
    text = " ".join(page.text)
    assert "Diverged: " in text
    planned = {(row["id"], s) for row in rows(folder, "plan.csv") for s in row["seeds"].split()}
    ended = {(row["id"], row["seed"]) for row in rows(folder, "runs.csv")}
    assert f"{len({one for one in planned if one[0]} - ended)} planned runs not run yet" in text


def test_verdicts_and_the_recipe(folder: Path, page: Page) -> None:
    values = list(cells(folder, "table1", "best_accuracy")["SPEM"].values())
    half = scipy_stats.t.ppf(0.975, 2) * statistics.stdev(values) * (1 + 1 / 3) ** 0.5
    mean = statistics.mean(values)
    verdict = line(page, "table1-cifar10", "SPEM")["verdict"]
    assert verdict == f"outside [{mean - half:.2f}, {mean + half:.2f}]; another recipe"
    text = " ".join(page.text)
    wanted = "depth 11 instead of 164, 5,000 training images instead of 50,000, 5 epochs instead"
    assert wanted in text
    assert "no comparison with the paper's numbers" in text


def test_the_headline_names_controls_and_plain(folder: Path, page: Page) -> None:
    last = cells(folder, "controls")
    text = plain(" ".join(page.text))
    for arm in ("plain", "scale", "plain, branches start at 0.032"):
        pairs = [last["SPEM (text)"][s] - last[arm][s] for s in range(8)]
        assert f"SPEM (text) - {arm}: {statistics.mean(pairs):+.2f} points over 8 paired" in text
    own, base = last["SPEM (text)"], last["scale"]
    r = statistics.correlation([own[s] for s in range(8)], [base[s] for s in range(8)])
    found = line(page, "headline", "SPEM (text) \N{MINUS SIGN} scale")
    assert found["correlation"] == f"{r:.2f}"
    assert "; the attention's part" in found["difference"]
    # the arms were made with these means: text as its controls, code 1.5 above
    assert "SPEM (code) is above “plain”, “plain, branches start at 0.032”, “scale”" in text
    assert "not shown to be above or below “plain, branches start at 0.032” and “scale”" in text


def test_sentences_name_the_family_of_the_correction(folder: Path, page: Page) -> None:
    """Each control is compared with the five other arms, and that is what Holm corrects for."""
    text = " ".join(page.text)
    assert "also after correction for the 5 comparisons with “scale” (Holm p" in text
    assert "for all comparisons of the table" not in text
    assert "not across columns or tables" in text
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "not across columns or tables" in markdown
    assert "correction for the 5 comparisons with “plain” (Holm" in markdown


def test_three_seeds_are_not_marked(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    sections = html.split('<section class="table"')
    (modules,) = [one for one in sections if one.startswith(' id="table-table1-cifar10"')]
    (arms,) = [one for one in sections if one.startswith(' id="table-controls-cifar10"')]
    assert 'class="r above"' not in modules
    assert 'class="r above"' in arms
    assert 'class="r below"' in arms


def test_links_lead_to_runs(folder: Path, page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids)
    assert len(inside) == len({link.lstrip("#") for link in page.links})
    for row in rows(folder, "runs.csv"):
        assert f"run-{row['id']}-{row['seed']}" in page.ids
    html = (folder / "report.html").read_text(encoding="utf-8")
    spem = ids(folder, "table1")["SPEM"]
    assert f'title="runs: {spem}, seed 0 1 2"' in html


def test_nothing_from_outside(page: Page) -> None:
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.addresses)


def test_what_hurts_is_escaped(folder: Path, page: Page) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert NASTY.split(" | ")[0] in " ".join(page.text)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert r"\[c\](d)" in markdown
    latex = (folder / "tables" / "family.tex").read_text(encoding="utf-8")
    assert r"\textless{}script\textgreater{}" in latex
    assert r"\input" not in latex
    assert r"\textbackslash{}input\{a\}" in latex
    assert r"\$x\_1\$" in latex
    assert r"\#\%" in latex


def test_markdown_tables_have_even_rows(folder: Path) -> None:
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    table: list[int] = []
    seen = 0
    for text in [*lines, ""]:
        if text.startswith("|"):
            table.append(len(re.findall(r"(?<!\\)\|", text)))
        elif table:
            assert len(set(table)) == 1, text
            seen += 1
            table = []
    assert seen > 10


def test_latex_rows_fit_their_columns(folder: Path) -> None:
    for path in (folder / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        text.encode("ascii")
        parts = re.findall(r"\\begin{tabular}{([lr]+)}(.*?)\\end{tabular}", text, re.DOTALL)
        assert parts
        for columns, body in parts:
            for row in re.findall(r"^(.*) \\\\$", body, re.MULTILINE):
                assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
            assert all(rule in body for rule in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_figures_are_whole_and_named(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == len(list((folder / "figures").glob("*.pdf")))
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 20
        known = {element.get("id") for element in root.iter()}
        for element in root.iter():
            for value in element.attrib.values():
                for name in re.findall(r"url\(#(.*?)\)|^#(.+)$", value):
                    assert "".join(name) in known


def test_data_are_named(page: Page) -> None:
    text = " ".join(page.text)
    assert "by their checksum the test images are those of a copy in which 23 of the 10,000" in text
    assert "* 23 of the 10,000 test images are JPEG copies" in text
    assert "The training images were not compared." in text
    assert "of the 60,000" not in text  # the sums in the folder are of test sets
    assert "Table 1: modules, CIFAR-10*" in text
    assert "Table 1: modules, CIFAR-100*" not in text


def test_differences_from_the_paper_are_told(page: Page) -> None:
    text = " ".join(page.text)
    for what, how in DIFFERENCES:
        assert what in text
        assert how in text
    assert {"CBAM's parameters", "ECA's parameters on CIFAR-100"} <= dict(DIFFERENCES).keys()


def test_depths_are_compared_with_the_same_depth(folder: Path, page: Page) -> None:
    last = cells(folder, "table2")
    for depth in (83, 164, 245):
        own, base = last[f"ResNet{depth}, SPEM"], last[f"ResNet{depth}, plain"]
        mean = statistics.mean(own[seed] - base[seed] for seed in range(3))
        found = line(page, "table2-cifar10", f"ResNet{depth}, SPEM")
        assert plain(found["\N{MINUS SIGN} plain, same depth"]).startswith(f"{mean:+.2f} ")


def test_the_curve_ends_at_the_mean(folder: Path) -> None:
    last = cells(folder, "table1")["SPEM"]
    html = (folder / "report.html").read_text(encoding="utf-8")
    label = re.search(r'aria-label="(Learning curves on CIFAR-10,[^"]*)"', html)
    assert label
    assert f"SPEM {statistics.mean(last.values()):.2f} %" in label[1]
