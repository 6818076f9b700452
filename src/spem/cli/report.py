"""`spem report`: rebuild the report of a results folder from its CSV files alone."""

from pathlib import Path

from spem.cli.output import print_json


def run(args: list[str]) -> None:
    """Run `spem report` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def report(results: Positional[Path], /, *, json: bool = False) -> None:
        """Rebuild the report of a results folder: HTML, Markdown, LaTeX, CSV and PDF.

        Nothing is trained and no run is read: plan.csv, runs.csv and the tables beside them are
        enough. The same files give the same bytes.

        Args:
            results: Folder that `spem reproduce --results` wrote.
            json: Print the files written as JSON.
        """
        from spem.reproduce.report import build_report

        files = build_report(results)
        if json:
            print_json({"files": [str(path) for path in files]})
            return
        print(f"wrote {results / 'report.html'} and {len(files) - 1} files beside it")

    tyro.cli(report, prog="spem report", args=args)
