"""`spem demo`: a comparison of a few minutes on a laptop, without a network connection."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from spem.cli.options import Json
from spem.cli.progress import carry_out

ARMS = ("none", "control", "se", "spem")
EPOCHS, BATCH, WEIGHT_DECAY = 60, 128, 3e-3
"""Twelve steps an epoch; the plain network stops improving by then, at about 98 %."""
OPENING = """\
Networks of 11 layers on scikit-learn's 8x8 digits: without attention (none), the same with \
branches that start as small as SPEM's (control), SE and SPEM; 3 seeds each."""
CLOSING = """\
The picture shows how far each network is from the plain one on digits, pair by pair of equal
seeds. One of the 360 small test images is worth 0.3 points, and the plain network has fewer than
ten of them wrong, so digits cannot rank attention modules: that needs real images and more seeds.
What to try next:
  spem list                                                the modules there are
  spem compare none control se spem --data cifar10         on CIFAR-10 (--root DIR if you have it)
  spem attach resnet50 spem                                in a network of timm or torchvision"""
_OUT = "folder for runs, tables and report"


def run(*, out: Annotated[Path, "DIR", _OUT] = Path("spem-demo"), json: Json = False) -> None:
    """Compare small networks on 8x8 digits: without attention, with a control, SE and SPEM."""
    from spem.reproduce.experiments import comparison
    from spem.reproduce.tables import COMPARE
    from spem.training import recipes

    config = replace(recipes.smoke(epochs=EPOCHS), experiment="demo")
    config = replace(config, optim=replace(config.optim, batch=BATCH, weight_decay=WEIGHT_DECAY))
    configs, baseline = comparison(config, ARMS, range(3))
    print(OPENING, file=sys.stderr, flush=True)
    planned = {config: [COMPARE] for config in configs}
    carry_out(planned, out / "runs", out, baseline=baseline, workers=workers(), json=json)
    if not json:
        print(f"picture: {out / 'comparison.png'}\n\n{CLOSING}")


def workers() -> int:
    """Two where there are two cores, and Ray, whose start costs a few seconds."""
    return 2 if importlib.util.find_spec("ray") is not None and (os.cpu_count() or 1) > 1 else 1
