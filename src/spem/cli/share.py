"""`spem share`: a finished run as a folder that others load, and on request on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from spem.cli.network import is_trained, load_network
from spem.cli.options import Json
from spem.cli.output import print_json

_RUN = "folder of a finished run, or its weights alone, without results"


def run(
    run: Annotated[str, "RUN", _RUN],
    *,
    folder: Annotated[Path | None, "DIR", "write here"] = None,
    to: Annotated[str | None, "OWNER/NAME", "send it to this Hugging Face repository"] = None,
    license: Annotated[str | None, "ID", "of the weights, such as apache-2.0"] = None,
    private: Annotated[bool, "make a new repository private"] = False,
    json: Json = False,
) -> None:
    """Write weights, config and a model card with the measured result of a run.

    Nothing leaves this machine without --to, which needs a login of yours (hf auth login).
    """
    if folder is None and to is None:
        raise ValueError("nowhere to write. Give --folder DIR, or --to OWNER/NAME to send it.")
    if not (Path(run).exists() and is_trained(run)):
        raise FileNotFoundError(f"there is no run {run}. Name the folder of a finished run.")
    from spem.share import FILES, check_id, push_to_hub, save_pretrained

    if to is not None:
        check_id(to, "share")
    found = load_network(run)
    if found.config is None:
        raise ValueError(f"{run} was shared before. Copy the folder, or name the run it came from.")
    images = {"size": found.size, "mean": list(found.mean), "std": list(found.std)}
    about: dict[str, Any] = {"images": images, "classes": found.classes, "license": license}
    about["results"] = run if Path(run).is_dir() else None
    sent = None
    if folder is not None:
        save_pretrained(found.model, folder, repo_id=to, **about)
    if to is not None:
        sent = push_to_hub(found.model, to, private=private or None, **about)
    if json:
        print_json({"folder": None if folder is None else str(folder), "sent": sent})
        return
    if folder is not None:
        print(f"{folder}: {', '.join(sorted(FILES))}")
        print(f'load it: spem.from_pretrained("{to or folder}")')
    if sent is not None:
        print(f"sent: {sent}")
