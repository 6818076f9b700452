"""`spem explain`: what trained attention keeps of an image, in numbers and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.network import Named, Network, is_trained, load_network
from spem.cli.options import Json, unknown
from spem.cli.output import new_file, print_json, print_table, say

if TYPE_CHECKING:
    from torch import Tensor

    from spem.explain import BlockView

_IMAGE = "an image file, scaled to what the network takes; or test:N, a test image, from 0"
_TOP = "channels shown of those most, and least, kept"


def run(
    network: Named,
    image: Annotated[str, "IMAGE", _IMAGE],
    *,
    out: Annotated[Path, "PICTURE", "a .png, .svg or .pdf", new_file] = Path("explain.png"),
    class_: Annotated[str | None, "CLASS", "name or number of one more to show"] = None,
    root: Annotated[Path | None, "DIR", "folder of the named data sets, for test:N"] = None,
    blocks: Annotated[int, "N", "rows of the picture"] = 6,
    top: Annotated[int, "N", _TOP] = 4,
    json: Json = False,
    **named: Annotated[Any, load_network],
) -> None:
    """Show an image to a network: gates block by block, channels most and least kept, answer."""
    if not image.startswith("test:") and not Path(image).is_file():
        raise FileNotFoundError(f"there is no image {image}.")
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        said = f"--out {out} is not a picture"
        raise ValueError(f"{said}. Name a file that ends in .png, .svg or .pdf.")
    from spem import explain as looking
    from spem.data import normalise
    from spem.insert.sites import attentions_of

    if named["attention"] and not named["weights"]:
        named["start"] = named["start"] or "module"  # an identity start would show nothing
    found = load_network(network, **named)
    if not attentions_of(found.model):
        remedy = "It was trained without any." if is_trained(network) else "Give --attention."
        raise ValueError(f"{network} has no attention to explain. {remedy}")
    shown, said = pixels(image, found, root)
    seen = looking.explain(found.model, normalise(shown[None], found.mean, found.std))
    answered = [] if seen.probabilities is None else seen.probabilities.tolist()
    if not all(map(math.isfinite, answered)):
        raise FloatingPointError(f"the outputs of {network} for {image} are not finite numbers.")
    names = found.classes or tuple(map(str, range(len(answered))))
    best = sorted(range(len(answered)), key=lambda k: -answered[k])[:3]
    marked = None
    if class_ is not None:
        numbers = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
        if class_ not in numbers:
            raise ValueError(f"--class: {unknown('class', class_, names)}")
        marked = numbers[class_]
        best += [marked] if answered and marked not in best else []
    title = f"{found.titled(Path(network).name)}, {said}"
    looking.draw(
        seen, shown, out, title=title, classes=names, marked=marked, blocks=blocks, top=top
    )
    answers = [{"class": names[k], "number": k, "probability": answered[k]} for k in best]
    if json:
        keys = ("name", "attention", "spatial", "mean", "closed", "lambdas", "alpha")
        views = [
            {key: getattr(block, key) for key in keys}
            | {"most": block.order[:top], "least": block.order[::-1][:top]}
            | {"gates": block.kept.tolist()}
            for block in seen.blocks
        ]
        told = {"network": network, "image": image, "picture": str(out), "answers": answers}
        print_json(told | {"blocks": views})
        return
    say(title)
    if answers:
        say("answer:", ", ".join(f"{a['class']} {a['probability']:.3f}" for a in answers))
    _print(seen.blocks, top)
    print(f"picture: {out}")


def pixels(image: str, found: Network, root: Path | None) -> tuple[Tensor, str]:
    """The image as the network is shown it, uint8 [3, H, W], and what it is in words."""
    import torch

    from spem.data.folder import decode, fit

    found.require_colour()
    if image.startswith("test:"):
        if found.config is None:
            raise ValueError(f"{image}: {found.text} names no data set. Give an image file.")
        images, number = found.test_images(None, root), image[5:]
        if not number.isdecimal() or int(number) >= len(images):
            there = f"the test images of {images.name} have the numbers 0 to {len(images) - 1}"
            raise ValueError(f"{image}: {there}.")
        truth = images.classes[int(images.labels[int(number)])]
        return images.images[int(number)], f"test image {number} ({truth})"
    array, said = decode(image, Path(image)), Path(image).name
    height, width = array.shape[:2]
    if found.size is not None and (height, width) != (found.size, found.size):
        array = fit(array, found.size)
        said += f" ({width}x{height}, its middle scaled to {found.size}x{found.size})"
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous(), said


def _print(blocks: list[BlockView], top: int) -> None:
    from spem.explain import number

    mixed, started = any(b.lambdas for b in blocks), any(b.alpha is not None for b in blocks)
    columns = ["block", "attention", "C", "mean gate", "< 0.1", "most kept", "least kept"]
    columns += ["lambda"] * mixed + ["alpha"] * started
    rows: list[list[object]] = []
    for block in blocks:
        row: list[object] = [block.name, block.attention, len(block.kept), f"{block.mean:.4f}"]
        kept = [f"{c}:{number(float(block.kept[c]))}" for c in block.order]
        row += [f"{100 * block.closed:.0f} %", " ".join(kept[:top]), " ".join(kept[::-1][:top])]
        row += [" ".join(f"{lam:.3f}" for lam in block.lambdas.values())] * mixed
        row += ["" if block.alpha is None else f"{block.alpha:.4f}"] * started
        rows.append(row)
    print_table(columns, rows)
    if any(block.spatial for block in blocks):
        print("Gates that differ from position to position count by their mean.")
    if any(block.adds for block in blocks):
        print("These modules also add to the map, which their gates do not show.")
