"""`spem share`: a finished run as a folder that others load, and on request on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spem.cli.options import Options, UsageError
from spem.cli.output import print_json


def options() -> Options:
    """What the command takes."""
    o = Options(
        "share",
        "Write weights, config and a model card with the measured result of a run. Nothing leaves "
        "this machine without --to, which needs a login of yours (hf auth login).",
    )
    o.add("run", "RUN", "folder of a finished run, or its weights alone, which bring no results")
    o.add("--folder", "DIR", "write here", kind=Path)
    o.add("--to", "OWNER/NAME", "send it to this repository of the Hugging Face hub")
    o.add("--license", "ID", "of the weights, as the hub spells it, such as apache-2.0")
    o.flag("--private", "make a new repository private")
    return o.json()


def run(
    *, run: str, folder: Path | None, to: str | None, license: str | None, private: bool, json: bool
) -> None:
    """Write the folder, and send it where that is asked for."""
    if folder is None and to is None:
        raise UsageError("nowhere to write. Give --folder DIR, or --to OWNER/NAME to send it.")
    if not Path(run).exists():
        raise FileNotFoundError(f"there is no run {run}. Name the folder of a finished run.")
    from spem.cli.network import load_network
    from spem.share import FILES, check_id, push_to_hub, save_pretrained

    if to is not None:
        check_id(to, "share")
    found = load_network(run)
    if found.config is None:
        raise ValueError(f"{run} was shared before. Copy the folder, or name the run it came from.")
    describing: dict[str, Any] = {
        "results": run if Path(run).is_dir() else None,
        "images": {"size": found.size, "mean": list(found.mean), "std": list(found.std)},
        "classes": found.classes,
        "license": license,
    }
    sent = None
    if folder is not None:
        save_pretrained(found.model, folder, repo_id=to, **describing)
    if to is not None:
        sent = push_to_hub(found.model, to, private=private or None, **describing)
    if json:
        print_json({"folder": None if folder is None else str(folder), "sent": sent})
        return
    if folder is not None:
        print(f"{folder}: {', '.join(sorted(FILES))}")
        print(f'load it: spem.from_pretrained("{to or folder}")')
    if sent is not None:
        print(f"sent: {sent}")
