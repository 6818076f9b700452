"""`spem explain`: what trained attention keeps of an image, in numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.network import NETWORK_HELP, Network, add_start, load_network
from spem.cli.options import Options, UsageError, integer, unknown
from spem.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from torch import Tensor

    from spem.explain import BlockView, Explanation


def options() -> Options:
    """What the command takes."""
    o = Options(
        "explain",
        "Show an image to a network: gates block by block, channels most and least kept, answer.",
    )
    o.add("network", "NETWORK", NETWORK_HELP)
    o.add(
        "image",
        "IMAGE",
        "an image file, scaled to what the network takes; or test:N, "
        "number N, from 0, of the test images",
    )
    o.add("--out", "PICTURE", "a .png, .svg or .pdf", kind=Path, default=Path("explain.png"))
    o.add("--class", "CLASS", "show the probability of this class too, by name or number")
    o.add("--attention", "ATTENTION", "put into a named network, such as spem")
    o.add("--weights", "FILE", "a .safetensors file of weights for a named network", kind=Path)
    add_start(o)
    o.add("--classes", "N", "outputs of a named network", kind=integer(1), rare=True)
    o.add("--size", "PIXELS", "side of its images; else what it is made for", kind=integer(1))
    o.add("--root", "DIR", "folder that holds the named data sets, for test:N", kind=Path)
    o.add("--blocks", "N", "rows of the picture", kind=integer(1), default=6)
    o.add("--top", "N", "channels shown of those most, and least, kept", kind=integer(1), default=4)
    return o.json()


def run(
    *,
    network: str,
    image: str,
    out: Path,
    attention: str | None,
    weights: Path | None,
    start: str | None,
    classes: int | None,
    size: int | None,
    root: Path | None,
    blocks: int,
    top: int,
    json: bool,
    **rest: str | None,
) -> None:
    """Show the image, draw the picture, print the table."""
    from spem.files import require_regular

    if not image.startswith("test:") and not Path(image).is_file():
        raise FileNotFoundError(f"there is no image {image}.")
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out {out} is no picture. Name a file that ends in .png, .svg or .pdf.")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}.")
    require_regular(out, missing_ok=True)
    from spem import explain as looking
    from spem.data import normalise

    label = rest["class"]
    found = load_network(
        network,
        attention=attention,
        start=start or ("module" if attention and weights is None else None),
        classes=classes,
        weights=weights,
        size=size,
    )
    shown, said = pixels(image, found, root)
    seen = looking.explain(found.model, normalise(shown[None], found.mean, found.std))
    count = 0 if seen.probabilities is None else len(seen.probabilities)
    names = found.classes or tuple(str(number) for number in range(count))
    marked = None if label is None else _class_number(label, names)
    title = f"{Path(network).name}: {found.text}{', random weights' * found.random}, {said}"
    looking.draw(
        seen, shown, out, title=title, classes=names, marked=marked, blocks=blocks, top=top
    )
    answers = _answers(seen, names, marked)
    if json:
        print_json(
            {
                "network": network,
                "image": image,
                "picture": str(out),
                "answers": answers,
                "blocks": [_plain(block, top) for block in seen.blocks],
            }
        )
        return
    say(title)
    if answers:
        say("answer: " + ", ".join(f"{a['class']} {a['probability']:.3f}" for a in answers))
    _print(seen.blocks, top)
    print(f"picture: {out}")


def pixels(image: str, found: Network, root: Path | None) -> tuple[Tensor, str]:
    """The image as the network is shown it, uint8 [3, H, W], and what it is in words.

    Raises:
        ValueError: It is no image, or there is no test image of this number.
    """
    import torch

    if image.startswith("test:"):
        from spem.training import load_test_images

        if found.config is None:
            raise ValueError(f"{image}: {found.text} names no data set. Give an image file.")
        images = load_test_images(found.config, found.data, root=root)
        number = image.removeprefix("test:")
        if not number.isdecimal() or int(number) >= len(images):
            raise ValueError(
                f"{image}: the test images of {images.name} have the numbers 0 to "
                f"{len(images) - 1}."
            )
        truth = images.classes[int(images.labels[int(number)])]
        return images.images[int(number)], f"test image {number} ({truth})"
    from spem.data.folder import decode, fit

    array = decode(image, Path(image))
    height, width = array.shape[:2]
    said = Path(image).name
    if found.size is not None and (height, width) != (found.size, found.size):
        array = fit(array, found.size)
        said += f" ({width}x{height}, its middle scaled to {found.size}x{found.size})"
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous(), said


def _class_number(label: str, classes: tuple[str, ...]) -> int:
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise ValueError(f"--class: {unknown('class', label, classes)}")


def _answers(
    seen: Explanation, classes: tuple[str, ...], marked: int | None
) -> list[dict[str, Any]]:
    """The three most probable classes, and the one asked for."""
    if seen.probabilities is None:
        return []
    best = seen.probabilities.argsort(descending=True, stable=True)[:3].tolist()
    if marked is not None and marked not in best:
        best.append(marked)
    return [
        {"class": classes[k], "number": k, "probability": float(seen.probabilities[k])}
        for k in best
    ]


def _plain(block: BlockView, top: int) -> dict[str, Any]:
    """A block as JSON has it."""
    return {
        "name": block.name,
        "attention": block.attention,
        "spatial": block.spatial,
        "mean": block.mean,
        "closed": block.closed,
        "most": block.order[:top],
        "least": block.order[::-1][:top],
        "gates": [float(value) for value in block.kept],
        "lambdas": block.lambdas,
        "alpha": block.alpha,
    }


def _print(blocks: list[BlockView], top: int) -> None:
    from spem.explain import number

    def channels(block: BlockView, order: list[int]) -> str:
        return " ".join(f"{c}:{number(float(block.kept[c]))}" for c in order[:top])

    columns = ["block", "attention", "C", "mean gate", "< 0.1", "most kept", "least kept"]
    mixed, started = any(b.lambdas for b in blocks), any(b.alpha is not None for b in blocks)
    columns += ["lambda"] * mixed + ["alpha"] * started
    rows: list[list[str]] = []
    for block in blocks:
        order = block.order
        row = [block.name, block.attention, str(len(order)), f"{block.mean:.4f}"]
        row += [f"{100 * block.closed:.0f} %", channels(block, order), channels(block, order[::-1])]
        row += [" ".join(f"{lam:.3f}" for lam in block.lambdas.values())] * mixed
        row += ["" if block.alpha is None else f"{block.alpha:.4f}"] * started
        rows.append(row)
    print_table(columns, rows, align="llrrrll" + "r" * (mixed + started))
    if any(block.spatial for block in blocks):
        print("Gates that differ from position to position count by their mean.")
    if any(block.adds for block in blocks):
        print("These modules also add to the map, which their gates do not show.")
