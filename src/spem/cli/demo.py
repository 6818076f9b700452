"""`spem demo`: a comparison small enough for a minute on a laptop, without a network connection."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spem.training import RunConfig


def run(args: list[str]) -> None:
    """Run `spem demo` with these arguments."""
    import tyro

    def demo(*, out: Path = Path("spem-demo"), json: bool = False) -> None:
        """Compare none, se and spem on digits: a small network, 3 seeds, about a minute on a CPU.

        Args:
            out: Folder for runs, CSV files and picture.
            json: Print the table as JSON.
        """
        from spem.cli.compare import compare

        print(
            "Comparing small networks on 8x8 digits: without attention (none), with se and spem; "
            "3 seeds each, finished ones are not trained again.",
            file=sys.stderr,
        )
        compare(
            demo_config(), ("none", "se", "spem"), range(3), runs=out / "runs", out=out, json=json
        )
        if not json:
            print(_next(out))

    tyro.cli(demo, prog="spem demo", args=args)


def demo_config() -> "RunConfig":
    """The smoke recipe in half as many steps: a run takes seconds and still learns."""
    from spem.training import recipes

    smoke = recipes.smoke()
    optim = replace(smoke.optim, batch=32, milestones=(7, 9))
    return replace(smoke, optim=optim, experiment="demo")


def _next(out: Path) -> str:
    return f"""
Picture: {out / "comparison.png"}   table: {out / "summary.csv"}
Ten epochs on tiny digits show that everything works, not which module is better on real images.
What to try next:
  spem list                                        the modules there are
  spem cost cifar:164 --attention spem             what they cost
  spem compare none scale se spem --data cifar10   on CIFAR-10 (--root DIR if you have it)
  spem train paper --attention spem                the paper's recipe; bring a GPU"""
