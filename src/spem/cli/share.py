"""`spem share`: a finished run as a folder that others load, and on request on the hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

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
    *,
    run: str,
    folder: Path | None,
    to: str | None,
    license: str | None,
    private: bool,
    json: bool,
) -> None:
    """Write the folder, and send it where that is asked for."""
    if folder is None and to is None:
        raise UsageError("nowhere to write. Give --folder DIR, or --to OWNER/NAME to send it.")
    from spem.hub import share_run
    from spem.hub.folder import FILES
    from spem.hub.remote import check_id, push_folder

    if to is not None:
        check_id(to, "share")
    with TemporaryDirectory() as temporary:
        written = share_run(Path(run), folder or temporary, license=license, repo_id=to)
        sent = None if to is None else push_folder(written, to, private=private or None)
    if json:
        print_json({"folder": None if folder is None else str(folder), "sent": sent})
        return
    if folder is not None:
        print(f"{folder}: {', '.join(sorted(FILES))}")
        print(f'load it: spem.from_pretrained("{to or folder}")')
    if sent is not None:
        print(f"sent: {sent}")
