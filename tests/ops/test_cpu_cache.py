"""Where compiled CPU kernels are kept, and when they are compiled again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytestmark = pytest.mark.slow  # interpreters that start and compile

SOURCE = Path(__file__).resolve().parents[2] / "src"
SCRIPT = """
import logging, sys, warnings
warnings.simplefilter("error")
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import spem.ops
assert "numba" not in sys.modules
import torch
from spem.ops import cpu
for _ in range(2):
    z, v, c = torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.ones(3)
    y = cpu.affine_tail(z, z, c, v, c, c)
assert (y == 2).all()
"""


def run_script(source, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")}
    environment |= {"PYTHONPATH": str(source), **settings}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_kernels_are_kept_on_disk(tmp_path):
    first = run_script(SOURCE, NUMBA_CACHE_DIR=str(tmp_path))
    assert first.count("affine_tail for torch.float32 compiled in") == 1
    assert run_script(SOURCE, NUMBA_CACHE_DIR=str(tmp_path)) == ""


def test_nowhere_to_keep_kernels(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # A file where the directory would be stops even a user whom permissions do not.
    (tmp_path / "src/spem/ops/cpu/__pycache__").touch()
    nowhere = {"HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache"}
    for _ in range(2):
        assert run_script(tmp_path / "src", **nowhere).count("compiled in") == 1


def test_a_change_of_any_source_compiles_again(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    place = str(tmp_path / "cache")
    assert "compiled" in run_script(tmp_path / "src", NUMBA_CACHE_DIR=place)
    with (tmp_path / "src/spem/ops/cpu/language.py").open("a") as file:
        file.write("# changed\n")
    assert "compiled" in run_script(tmp_path / "src", NUMBA_CACHE_DIR=place)


def test_files_cut_short_are_written_again(tmp_path):
    place = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_script(SOURCE, **place)
    for kind in ("nbi", "nbc"):
        [file] = tmp_path.rglob(f"*.{kind}")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert run_script(SOURCE, **place).count("compiled in") == 1
    assert run_script(SOURCE, **place) == ""
