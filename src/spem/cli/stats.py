"""`spem stats`: paired statistics of anybody's results, from any tidy CSV."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.output import decimals_for, p_text, print_json, print_table

if TYPE_CHECKING:
    from spem.reproduce.inference import Compared, PairedTest
    from spem.reproduce.tidy import Answer, Question


def run(args: list[str]) -> None:
    """Run `spem stats` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def stats(
        file: Positional[Path],
        /,
        *,
        by: tuple[str, ...] = (),
        value: str | None = None,
        pair: str | None = None,
        baseline: str | None = None,
        within: tuple[str, ...] | None = None,
        equivalence: float | None = None,
        level: float = 0.95,
        json: bool = False,
    ) -> None:
        """Paired differences of any results: one run a row, in CSV with a heading.

        Runs of two groups that have the same seed are a pair; what is compared is the mean of the
        differences of pairs, with the interval and the test that their number allows.

        Args:
            file: The CSV file, for example runs.csv of `spem compare`.
            by: Columns that name a group (default attention, or the usual name there is).
            value: Column of the number compared (default accuracy, or the usual name there is).
            pair: Column of what makes a pair (default seed, or the usual name there is).
            baseline: Group that the others are compared with (default none, else the first).
            within: Columns that split the file into tables (default those of dataset, depth).
            equivalence: Margin, fixed beforehand: also test whether differences are smaller.
            level: Level of the intervals.
            json: Print JSON.
        """
        from spem.reproduce.statistics import check_level
        from spem.reproduce.tidy import answer, ask, read_rows, split

        check_level("stats", level)
        rows = read_rows(file)
        question = ask(rows, by=by, value=value, pair=pair, within=within)
        parts, left_out = split(rows, question)
        answers = answer(parts, baseline=baseline, margin=equivalence, level=level)
        notes = [*question.notes, *left_out]
        if json:
            print_json(_document(file, question, answers, notes))
        else:
            _print(question, answers, notes, level)

    tyro.cli(stats, prog="spem stats", args=args)


def _print(question: "Question", answers: "list[Answer]", notes: list[str], level: float) -> None:
    for note in notes:
        print(_plain(note))
    if notes:
        print()
    for answer in answers:
        _print_table(question, answer, level)
    print("n: values; pairs: those the difference is over.")
    print("r: correlation of the pairs, with its interval from four pairs on (Fisher).")
    print("p: of no difference, paired t test below six pairs and sign-flip test from six on.")
    print("Holm p: the same, corrected for all comparisons of the table.")


def _print_table(question: "Question", answer: "Answer", level: float) -> None:
    decimals = _decimals(answer)
    columns = [question.by[0], "n", "mean", "sd", "pairs", f"to {_plain(answer.baseline)}"]
    columns += [f"{100 * level:g} % interval", "method", "p", "Holm p", "r"]
    rows = [_cells(line, decimals) for line in answer.lines]
    title = ", ".join(f"{name}={cell}" for name, cell in answer.part.within.items())
    title = _plain(": ".join(filter(None, [title, question.value])))
    print_table(columns, rows, align="lrrrrrllrrl", title=title)
    print()
    for text in [*_reading(question, answer, decimals), *answer.part.notes]:
        print(_plain(text))
    print()


def _cells(line: "Compared", decimals: int) -> list[str]:
    test, sd = line.test, line.summary.sd
    cells = [_plain(line.name), str(line.summary.n), f"{line.summary.mean:.{decimals}f}"]
    cells.append("-" if sd is None else f"{sd:.{decimals}f}")
    if test is None:
        return cells + ["-"] * 7
    return [
        *cells,
        str(test.n),
        "-" if test.mean is None else f"{test.mean:+.{decimals}f}",
        test.interval_in(decimals),
        test.interval or "-",
        p_text(test.p),
        p_text(line.adjusted_p),
        _correlation(test),
    ]


def _correlation(test: "PairedTest") -> str:
    from spem.reproduce.inference import correlation_interval

    if test.correlation is None:
        return "-"
    ends = correlation_interval(test.correlation, test.n, test.level)
    return f"{test.correlation:+.2f}" + (
        "" if ends is None else f" [{ends[0]:+.2f}, {ends[1]:+.2f}]"
    )


def _decimals(answer: "Answer") -> int:
    spreads = [line.summary.sd for line in answer.lines]
    spreads += [line.test.sd for line in answer.lines if line.test is not None]
    return decimals_for(spreads)


def _unit(question: "Question", answer: "Answer") -> str:
    """Points, where the numbers are accuracies in percent."""
    percent = max(abs(line.summary.mean) for line in answer.lines) > 1.5
    return "points" if "acc" in question.value and percent else ""


def _reading(question: "Question", answer: "Answer", decimals: int) -> list[str]:
    """What a table shows and what it does not, in sentences."""
    from spem.reproduce.inference import equivalence_sentence, reach_sentence, sentence

    unit = _unit(question, answer)
    compared = [(line, line.test) for line in answer.lines if line.test is not None]
    if not compared:
        return [f"Nothing is compared with {answer.baseline} here: there are no two such groups."]
    texts = [
        sentence(
            line.name,
            answer.baseline,
            test,
            line.adjusted_p if len(compared) > 1 else None,
            unit=unit,
            decimals=decimals,
            pair=question.pair,
        )
        for line, test in compared
    ]
    reach = reach_sentence(answer.lines)
    texts += [reach] if reach else []
    return texts + [
        equivalence_sentence(name, answer.baseline, test, unit=unit, decimals=decimals)
        for name, test in answer.equivalences.items()
    ]


def _plain(text: str) -> str:
    """Text from a file without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _document(
    file: Path, question: "Question", answers: "list[Answer]", notes: list[str]
) -> dict[str, Any]:
    return {
        "file": str(file),
        "by": list(question.by),
        "value": question.value,
        "pair": question.pair,
        "notes": notes,
        "tables": [_table(question, answer) for answer in answers],
    }


def _table(question: "Question", answer: "Answer") -> Mapping[str, Any]:
    return {
        "within": dict(answer.part.within),
        "baseline": answer.baseline,
        "groups": [_group(line, answer) for line in answer.lines],
        "notes": list(answer.part.notes),
        "reading": _reading(question, answer, _decimals(answer)),
    }


def _group(line: "Compared", answer: "Answer") -> Mapping[str, Any]:
    from spem.reproduce.inference import correlation_interval, smallest_visible

    test, visible, ends = line.test, None, None
    if test is not None and test.sd:
        visible = smallest_visible(test.sd, test.n, level=test.level)
    if test is not None and test.correlation is not None:
        ends = correlation_interval(test.correlation, test.n, test.level)
    margin = answer.equivalences.get(line.name)
    return {
        "name": line.name,
        **dataclasses.asdict(line.summary),
        "difference": None if test is None else dataclasses.asdict(test),
        "correlation_interval": ends,
        "adjusted_p": line.adjusted_p,
        "shown": line.shows,
        "smallest_visible": visible,
        "equivalence": None if margin is None else dataclasses.asdict(margin),
    }
