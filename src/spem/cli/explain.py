"""`spem explain`: what the attention of trained weights keeps of an image, told and drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.output import print_json, print_table, unknown
from spem.cli.subject import Subject, read_subject
from spem.extras import require

if TYPE_CHECKING:
    from torch import Tensor

    from spem.explain import BlockView, Explanation


def run(args: list[str]) -> None:
    """Run `spem explain` with these arguments."""
    import tyro
    from tyro.conf import Positional, arg

    def explain(
        checkpoint: Positional[Path],
        image: Positional[str],
        /,
        *,
        out: Path = Path("explain.png"),
        label: Annotated[str | None, arg(name="class")] = None,
        root: Path | None = None,
        blocks: int = 6,
        top: int = 4,
        json: bool = False,
    ) -> None:
        """Show an image to a network: gates block by block, channels most and least kept, answer.

        Args:
            checkpoint: A .safetensors file that a training wrote, the folder of a run, or a folder
                that spem share wrote.
            image: An image file (PNG, JPEG, WebP), whose middle square is scaled to the size of the
                training images; or test:N, number N, from 0, of the test images.
            out: The picture; the suffix gives the format (.png, .svg, .pdf).
            label: A class, by name or number, whose probability is told too.
            root: Folder that holds the named data sets, for test:N.
            blocks: Rows of the picture; of more blocks, as many are taken evenly.
            top: Channels shown of those most kept, and of those least kept.
            json: Print JSON.
        """
        from spem import explain as looking
        from spem.data import normalise

        subject = read_subject(checkpoint, "explain")
        shown, said = pixels(image, subject, root)
        seen = looking.explain(subject.model, normalise(shown[None], subject.mean, subject.std))
        count = 0 if seen.probabilities is None else len(seen.probabilities)
        classes = subject.classes or tuple(str(number) for number in range(count))
        marked = None if label is None else _class_number(label, classes)
        title = f"{checkpoint.name}: {subject.text}, {said}"
        looking.draw(
            seen, shown, out, title=title, classes=classes, marked=marked, blocks=blocks, top=top
        )
        answers = _answers(seen, classes, marked)
        if json:
            print_json(
                {
                    "checkpoint": str(checkpoint),
                    "image": image,
                    "picture": str(out),
                    "answers": answers,
                    "blocks": [_plain(block, top) for block in seen.blocks],
                }
            )
            return
        print(title)
        if answers:
            print("answer: " + ", ".join(f"{a['class']} {a['probability']:.3f}" for a in answers))
        _print(seen.blocks, top)
        print(f"picture: {out}")

    tyro.cli(explain, prog="spem explain", args=args)


def pixels(image: str, subject: Subject, root: Path | None) -> "tuple[Tensor, str]":
    """The image as the network is shown it, uint8 [3, H, W], and what it is in words.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image, or there is no test image of this number.
    """
    if not image.startswith("test:"):
        return _of_file(Path(image), subject.size)
    from spem.data import load_images

    if subject.data is None:
        raise ValueError(f"explain: {image}: these weights name no data set. Give an image file.")
    images = load_images(subject.data, "test", root=root, size=subject.size)
    number = image.removeprefix("test:")
    if not number.isdecimal() or int(number) >= len(images):
        raise ValueError(
            f"explain: {image}: the test images of {subject.data} have the numbers "
            f"0 to {len(images) - 1}."
        )
    index = int(number)
    truth = images.classes[int(images.labels[index])]
    return images.images[index], f"test image {index} ({truth})"


def _of_file(path: Path, size: int | None) -> "tuple[Tensor, str]":
    """The middle square of an image file, scaled; a network of no known size gets all of it."""
    import numpy as np
    import torch

    from spem.data.decode import decode

    pillow = require("PIL.Image", extra="train", purpose="spem explain")
    array = decode(str(path), path.read_bytes(), pillow)
    height, width = array.shape[:2]
    said = path.name
    if size is not None and (height, width) != (size, size):
        side = min(height, width)
        left, above = (width - side) // 2, (height - side) // 2
        square = pillow.fromarray(array).crop((left, above, left + side, above + side))
        array = np.asarray(square.resize((size, size), pillow.Resampling.BICUBIC))
        said += f" ({width}x{height}, its middle {side}x{side} scaled to {size}x{size})"
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous(), said


def _class_number(label: str, classes: tuple[str, ...]) -> int:
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise ValueError(f"explain: {unknown('class', label, classes)}")


def _answers(
    seen: "Explanation", classes: tuple[str, ...], marked: int | None
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


def _plain(block: "BlockView", top: int) -> dict[str, Any]:
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


def _print(blocks: "list[BlockView]", top: int) -> None:
    from spem.explain.picture import number

    def channels(block: "BlockView", order: list[int]) -> str:
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
        print("These modules also add to the map, which no gate tells.")
