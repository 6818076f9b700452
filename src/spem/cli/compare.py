"""`spem compare`: several attentions with the same seeds, as table, CSV and picture."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from spem.cli.output import decimals_for, p_text, print_json, print_table
from spem.cli.recipe import in_full, recipe_config
from spem.cli.user_module import register_from_file
from spem.extras import require

if TYPE_CHECKING:
    from spem.reproduce import Line
    from spem.training import RunConfig


class Request(NamedTuple):
    """What the command line asks for."""

    attentions: tuple[str, ...]
    config: "RunConfig"
    recipe: str | None
    data: str | None
    epochs: int | None
    seeds: str
    runs: Path
    out: Path
    json: bool


def run(args: list[str]) -> None:
    """Run `spem compare` with these arguments."""
    import tyro

    default = recipe_config("short")
    args = in_full(args)
    if not {"-h", "--help"} & set(args):
        # Read once for what chooses the defaults, and again with those.
        asked = tyro.cli(_signature(default), prog="spem compare", args=args)
        data = asked.data or asked.config.data.name
        recipe = asked.recipe or ("smoke" if data == "digits" else "short")
        default = recipe_config(recipe, dataset=data, epochs=asked.epochs)
    request = tyro.cli(_signature(default), prog="spem compare", args=args)
    compare(
        request.config,
        request.attentions,
        parse_seeds(request.seeds),
        runs=request.runs,
        out=request.out,
        json=request.json,
    )


def _signature(default: "RunConfig") -> Callable[..., Request]:
    from tyro.conf import Positional, arg

    from spem.training import RunConfig

    def compare(
        attentions: Positional[tuple[str, ...]],
        /,
        config: Annotated[RunConfig, arg(name="")] = default,
        *,
        module: tuple[str, ...] = (),
        data: str | None = None,
        recipe: str | None = None,
        epochs: int | None = None,
        seeds: str = "3",
        runs: Path = Path("runs"),
        out: Path = Path("comparison"),
        json: bool = False,
    ) -> Request:
        """Compare attentions on one data set: run what is missing, then table, CSV and picture.

        Short forms: --depth, --root, --val, --limit, --precision, --checkpoint-minutes.

        Args:
            attentions: What to compare, the reference first: none se "spem(form=code)" ...
            config: Every field of the recipe can be changed, for all runs alike.
            module: Modules of your own to compare too, each as file.py:ClassName: a torch module
                that takes the number of channels, and maps to maps of the same shape.
            data: Data set or path; brings its own size, flips and normalisation.
            recipe: paper, fast, short or smoke; without it smoke for digits and short for all else.
            epochs: Length of a run; the milestones move along.
            seeds: A number of seeds (3 is 0, 1, 2) or a list (0,4,7).
            runs: Folder of all runs; finished ones are not run again.
            out: Folder for the CSV files and the picture.
            json: Print the table as JSON.
        """
        own = tuple(register_from_file(where) for where in module)
        return Request((*attentions, *own), config, recipe, data, epochs, seeds, runs, out, json)

    return compare


def compare(
    config: "RunConfig",
    attentions: Sequence[str],
    seeds: Sequence[int],
    *,
    runs: Path,
    out: Path,
    json: bool = False,
) -> None:
    """Run what is missing of a comparison, write its files, and print its table.

    Raises:
        ValueError: See `spem.reproduce.plan`.
        FloatingPointError: A run diverged; the others are run and shown first.
    """
    require("scipy.stats", extra="train", purpose="spem compare")
    require("matplotlib", extra="train", purpose="spem compare")
    from spem.cli.progress import SeveralRuns
    from spem.reproduce import collect, plan, run_missing, table, write_csv
    from spem.reproduce.picture import draw
    from spem.training.memory import keep_freed_memory

    keep_freed_memory()
    configs = plan(config, attentions, seeds)
    reference = configs[0].model.attention
    out.mkdir(
        parents=True, exist_ok=True
    )  # a folder that cannot be written is found before hours of training
    progress = SeveralRuns(len(configs), done=len(collect(configs, runs)))
    try:
        diverged = run_missing(configs, runs, progress)
    finally:
        progress.stop()
    finished = collect(configs, runs)
    if finished:
        lines = table(finished, reference)
        title = describe(config, len(seeds))
        files = write_csv(finished, lines, out, reference=reference)
        picture = out / "comparison.png"
        draw(lines, finished, picture, title=title, reference=reference)
        _show(lines, reference, title, [*files, picture], json=json)
    if diverged:
        raise FloatingPointError(
            f"compare: {len(diverged)} of {len(configs)} runs diverged.\n" + "\n".join(diverged)
        )


def parse_seeds(text: str) -> list[int]:
    """The seeds that "3" (0, 1, 2) or "0,4,7" stand for.

    Raises:
        ValueError: The text is neither.

    >>> parse_seeds("3"), parse_seeds("0,4,7"), parse_seeds("5,")
    ([0, 1, 2], [0, 4, 7], [5])
    """
    if re.fullmatch(r"\d+", text):
        return list(range(int(text)))
    if re.fullmatch(r"\d+(,\d+)*,?", text):
        return [int(seed) for seed in text.strip(",").split(",")]
    raise ValueError(f"--seeds {text!r} is no number of seeds (3) and no list of them (0,4,7).")


def describe(config: "RunConfig", seeds: int) -> str:
    """What was trained, in one line."""
    model, data, optim = config.model, config.data, config.optim
    parts = [
        Path(data.name).name + (f" ({data.limit} training images)" if data.limit else ""),
        f"ResNet-{model.depth}" + (" (basic blocks)" if model.block == "basic" else ""),
        f"{optim.epochs} epoch" + ("s" if optim.epochs > 1 else ""),
        f"{seeds} seed" + ("s" if seeds > 1 else ""),
        config.runtime.precision,
    ]
    return ", ".join(parts)


def _show(
    lines: Sequence["Line"], reference: str, title: str, files: Sequence[Path], *, json: bool
) -> None:
    sentences = _reading(lines, reference)
    if json:
        rows = [dataclasses.asdict(line) for line in lines]
        paths = [str(path) for path in files]
        print_json(
            {
                "title": title,
                "reference": reference,
                "lines": rows,
                "reading": sentences,
                "files": paths,
            }
        )
        return
    best = f"best on {lines[0].best_selected_on}"
    columns = [
        "attention",
        "n",
        "accuracy %",
        "sd",
        f"{best} %",
        f"to {reference}",
        "95 % interval",
        "method",
        "p",
        "Holm p",
    ]
    decimals = _decimals(lines)
    cells = [_accuracy_cells(line, decimals) for line in lines]
    print_table(columns, cells, align="lrrrrrllrr", title=title)
    print("accuracy: test images, after the last epoch, mean over seeds.")
    print(f"{best}: at each run's best epoch, which flatters if chosen on the test images.")
    print(f"to {reference}: mean difference of runs with the same seed, in points.")
    print("p: of no difference, paired t test below six pairs and sign-flip test from six on.")
    print("Holm p: the same, corrected for all comparisons of the table.\n")
    columns = ["attention", "parameters", "MFLOPs", "ms/step", "time ratio"]
    print_table(columns, [_cost_cells(line) for line in lines], align="lrrrr")
    print()
    for sentence in sentences:
        print(sentence)
    print("\n" + "\n".join(f"wrote {path}" for path in files))


def _reading(lines: Sequence["Line"], reference: str) -> list[str]:
    """What the table shows and what it does not, in sentences."""
    from spem.reproduce.inference import reach_sentence, sentence

    decimals = _decimals(lines)
    compared = [(line, line.difference) for line in lines if line.difference is not None]
    texts = [
        sentence(
            line.attention,
            reference,
            test,
            line.adjusted_p if len(compared) > 1 else None,
            decimals=decimals,
        )
        for line, test in compared
    ]
    reach = reach_sentence([line.compared for line in lines])
    return [*texts, reach] if reach else texts


def _decimals(lines: Sequence["Line"]) -> int:
    spreads = [line.last.sd for line in lines]
    spreads += [line.difference.sd for line in lines if line.difference is not None]
    return decimals_for(spreads)


def _accuracy_cells(line: "Line", decimals: int) -> list[str]:
    d = line.difference
    return [
        line.attention,
        str(line.last.n),
        f"{line.last.mean:.{decimals}f}",
        "-" if line.last.sd is None else f"{line.last.sd:.{decimals}f}",
        f"{line.best.mean:.{decimals}f}",
        "-" if d is None or d.mean is None else f"{d.mean:+.{decimals}f}",
        "-" if d is None else d.interval_in(decimals),
        (d and d.interval) or "-",
        p_text(d and d.p),
        p_text(line.adjusted_p),
    ]


def _cost_cells(line: "Line") -> list[str]:
    return [
        line.attention,
        f"{line.parameters:,}",
        f"{line.flops / 1e6:.1f}",
        f"{line.step_ms:.1f}",
        "-" if line.step_ratio is None else f"{line.step_ratio:.2f}",
    ]
