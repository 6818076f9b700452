"""`spem share`: a finished run as a folder that others load, and on request on the hub."""

from pathlib import Path
from tempfile import TemporaryDirectory


def run(args: list[str]) -> None:
    """Run `spem share` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def share(
        weights: Positional[Path],
        /,
        *,
        folder: Path | None = None,
        to: str | None = None,
        license: str | None = None,
        private: bool = False,
    ) -> None:
        """Write weights, config and a model card with the measured result of a run.

        Nothing leaves this machine without --to. That needs a login of yours (hf auth login).

        Args:
            weights: The folder of a finished run, or a .safetensors file that a training wrote,
                which brings no results.
            folder: Write here.
            to: Send it to this repository of the Hugging Face hub, owner/name.
            license: Of the weights, as the hub spells it, such as apache-2.0.
            private: Make a new repository private.
        """
        from spem.hub import share_run
        from spem.hub.folder import FILES
        from spem.hub.remote import check_id, push_folder

        if folder is None and to is None:
            raise ValueError(
                "share: nowhere to write. Give --folder DIR, or --to OWNER/NAME to send it."
            )
        if to is not None:
            check_id(to, "share")
        with TemporaryDirectory() as temporary:
            written = share_run(weights, folder or temporary, license=license, repo_id=to)
            if folder is not None:
                print(f"{folder}: {', '.join(sorted(FILES))}")
                print(f'load it: spem.from_pretrained("{to or folder}")')
            if to is not None:
                print(f"sent: {push_folder(written, to, private=private or None)}")

    tyro.cli(share, prog="spem share", args=args)
