"""Folders of image files as people have them: what is read, how, and what is told."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from data.samples import random_images, write_image_folder
from PIL import Image
from torchvision import transforms

from spem.data import ImageSet, check_images, load_images
from spem.data.folder import look

CATS, DOGS = random_images(3, 5, 7, seed=1), random_images(2, 5, 7, seed=2)


def save(path: Path, image: Image.Image | np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(path, **options)


def write_set(root: Path) -> list[Path]:
    write_image_folder(root, "test", {"dog": DOGS[:1], "cat": CATS[:1]})
    return write_image_folder(root, "train", {"dog": DOGS, "cat": CATS})


def to_numpy(images: ImageSet) -> np.ndarray:
    return images.images.permute(0, 2, 3, 1).numpy()


def with_another(root: Path) -> Path:
    """A second class, of copies of the first image, and a test split like the training split."""
    (first,) = (root / "train" / "a").iterdir()
    for copy in ("train/b", "test/a", "test/b"):
        (root / copy).mkdir(parents=True)
        shutil.copy(first, root / copy)
    return root


def one(root: Path, name: str, image: Image.Image | np.ndarray, **options: object) -> np.ndarray:
    """An image that is read through a folder, [H, W, 3]."""
    save(root / "train" / "a" / name, image, **options)
    seen = load_images(str(with_another(root)), "train")
    return to_numpy(seen)[0]


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_set(tmp_path)
    train = load_images(str(tmp_path), "train")
    assert np.array_equal(to_numpy(train), np.concatenate([CATS, DOGS]))
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.classes == ("cat", "dog")
    assert load_images(str(tmp_path), "test").labels.tolist() == [0, 1]
    assert load_images(str(tmp_path), "train", sha256=train.sha256.upper()).name == tmp_path.name
    with pytest.raises(ValueError, match=rf"SHA-256 of the train images is {train.sha256}"):
        load_images(str(tmp_path), "train", sha256="0" * 64)


def test_the_reader_finds_what_torchvision_finds(tmp_path: Path) -> None:
    """Classes and files; links, kinds of files, folders below folders; not what programs leave."""
    write_set(tmp_path)
    cat = tmp_path / "train" / "cat"
    for name in ("9.bmp", "8.tif", "7.TIFF", "10.webp", "5.JPG", "4.jpeg", "3.ppm", "x/1.png"):
        save(cat / name, CATS[0])
    save(tmp_path / "elsewhere" / "a.png", CATS[0])
    (cat / "linked").symlink_to(tmp_path / "elsewhere")
    (cat / "notes.txt").write_text("no image")
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
    (cat / "loop").symlink_to(cat)  # leads back for ever
    for where in (cat / ".ipynb_checkpoints", cat / "__MACOSX", tmp_path / "train" / ".cache"):
        save(where / "0.png", CATS[0])
    (tmp_path / "train" / "__MACOSX" / "cat").mkdir(parents=True)
    for name in ("._0.png", ".DS_Store"):
        (cat / name).write_text("no image")
    listing = look(tmp_path)
    assert listing.files["train"] == [(Path(path), label) for path, label in theirs.samples]
    assert list(listing.classes) == theirs.classes
    assert len(load_images(str(tmp_path), "train")) == 3 + 2 + 9
    for name in ("5.jfif", "6.JPE"):  # which it leaves out without a word
        (cat / name).write_bytes((cat / "4.jpeg").read_bytes())
    assert len(load_images(str(tmp_path), "train")) == 3 + 2 + 9 + 2


@pytest.mark.parametrize("names", ["train val", "Train TEST", "Training Testing"])
def test_splits_have_several_names(tmp_path: Path, names: str) -> None:
    """A split in capitals is no class."""
    write_set(tmp_path)
    expected = [load_images(str(tmp_path), split).sha256 for split in ("train", "test")]
    for split, name in zip(("train", "test"), names.split(), strict=True):
        (tmp_path / split).rename(tmp_path / name)
    check_images(str(tmp_path))
    found = [load_images(str(tmp_path), split) for split in ("train", "test")]
    assert [part.sha256 for part in found] == expected
    assert {part.classes for part in found} == {("cat", "dog")}


def test_one_class_is_none(tmp_path: Path) -> None:
    """As of an archive unpacked into a folder of its own name: every network would be perfect."""
    save(tmp_path / "photos" / "cat" / "0.png", CATS[0])
    save(tmp_path / "photos" / "dog" / "0.png", CATS[0])
    with pytest.raises(ValueError, match=r"holds one folder alone \(photos\); two or more"):
        check_images(str(tmp_path))


def test_classes_without_splits_get_a_split_that_never_changes(tmp_path: Path) -> None:
    for label, count in (("cat", 10), ("dog", 20), ("eel", 2)):
        for i, image in enumerate(random_images(count, 4, 4, seed=count)):
            save(tmp_path / label / f"{i:02}.png", image)
    train, test = (load_images(str(tmp_path), s) for s in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 16, 1]
    assert test.labels.bincount().tolist() == [2, 4, 1]
    together = {image.numpy().tobytes() for part in (train, test) for image in part.images}
    assert len(together) == 32
    assert load_images(str(tmp_path), "test", test=0.2).sha256 == test.sha256
    half = load_images(str(tmp_path), "test", test=0.5)
    assert half.labels.bincount().tolist() == [5, 10, 1]
    (tmp_path / "eel" / "01.png").unlink()
    save(tmp_path / "fox" / "0.png", CATS[0])
    for read in (check_images, lambda name: load_images(name, "train")):
        few = r"of 1 image\(s\) none would be left to train on"
        with pytest.raises(ValueError, match=f"eel: {few}.*fox: {few}"):
            read(str(tmp_path))
    with pytest.raises(ValueError, match="cat: of 10 image"):
        check_images(str(tmp_path), test=0.99)
    write_set(tmp_path / "with")
    with pytest.raises(ValueError, match=r"data.test=0.3 has no effect"):
        check_images(str(tmp_path / "with"), test=0.3)
    with pytest.raises(ValueError, match=r"digits: .*data.test=0.3 has no effect"):
        check_images("digits", test=0.3)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((40, 60), 32), ((33, 32), 32), ((301, 77), 32), ((9, 20), 32), ((60, 40), 7)],
)
def test_sizes_are_those_of_torchvision(tmp_path: Path, shape: tuple[int, int], size: int) -> None:
    image = random_images(1, *shape)[0]
    save(tmp_path / "train" / "a" / "0.png", image)
    save(with_another(tmp_path) / "train" / "a" / "1.png", random_images(1, 50, 50)[0])
    for read in (check_images, lambda name: load_images(name, "train")):
        with pytest.raises(ValueError, match=r"2 different sizes: .*size=32"):
            read(str(tmp_path))
    found = load_images(str(tmp_path), "train", size=size)
    bring = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    assert np.array_equal(to_numpy(found)[0], np.asarray(bring(Image.fromarray(image))))
    assert found.images.shape == (3, 3, size, size)


# ---- kinds of pixels


def test_grey_and_palette_images_become_colour(tmp_path: Path) -> None:
    grey = CATS[0, ..., 0]
    cases = {
        "grey": (Image.fromarray(grey), grey),
        "palette": (Image.fromarray(grey).convert("P"), grey),
        "bits": (Image.fromarray(grey > 100), np.where(grey > 100, 255, 0)),
    }
    for name, (image, expected) in cases.items():
        assert np.array_equal(one(tmp_path / name, "0.png", image), np.dstack([expected] * 3)), name
    with pytest.raises(ValueError, match=r"32 bits.*save it with 8 or 16 bits"):
        one(tmp_path, "0.tif", np.random.default_rng(0).random((8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"32 bits.*save it with 8 or 16 bits"):
        one(tmp_path / "whole", "0.tif", np.arange(64, dtype=np.int32).reshape(8, 8))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    values[0, :3] = (0, 257, 65535)
    found = one(tmp_path, f"0.{kind}", values)
    assert np.array_equal(found, np.dstack([np.rint(values / 257).astype(np.uint8)] * 3))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_hidden_colours_of_transparent_pixels_do_not_appear(tmp_path: Path, mode: str) -> None:
    """They are put on white, half transparent ones in part."""
    colour = np.full((4, 4, 3), (200, 30, 90), dtype=np.uint8)
    alpha = np.array([[0, 255, 128, 0]] * 4, dtype=np.uint8)
    options: dict[str, object] = {}
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([colour, alpha]))
    elif mode == "LA":
        image = Image.merge("LA", [Image.fromarray(colour[..., 0]), Image.fromarray(alpha)])
        colour = np.dstack([colour[..., 0]] * 3)
    else:  # one colour counts as transparent
        colour[:, 1:] = 7
        image = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        options = {"transparency": int(np.asarray(image)[0, 0])}
        alpha = np.where(colour[..., 0] == 200, 0, 255).astype(np.uint8)
    share = alpha[..., None] / 255
    expected = share * colour + (1 - share) * 255
    assert np.abs(one(tmp_path, "0.png", image, **options) - expected).max() <= 1


def test_images_stand_upright_as_their_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:4, :4] = 255
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = one(tmp_path / str(orientation), "0.png", Image.fromarray(pixels), exif=exif)
        assert np.array_equal(found, expected), orientation
        save(tmp_path / str(orientation) / "train" / "a" / "1.png", np.ascontiguousarray(expected))
        check_images(str(tmp_path / str(orientation)))  # which sees equal sizes


# ---- faults


def test_all_faults_of_a_folder_are_told_at_once_and_without_torch(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "test" / "Dog").mkdir()
    save(tmp_path / "test" / "cat" / "a.gif", CATS[0])
    save(tmp_path / "train" / "stray.png", CATS[0])
    program = (
        "import sys\nfrom spem.data import check_images\n"
        "try: check_images(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for part in (
        f"{tmp_path / 'train' / 'eel'} holds no image (.jpg",
        f"the class eel is missing in {tmp_path / 'test'}",
        f"the class Dog is missing in {tmp_path / 'train'}",
        f"{tmp_path / 'test' / 'cat'} holds images of a kind that is not read (a.gif)",
        f"{tmp_path / 'train'} holds images that lie in no class (stray.png)",
    ):
        assert part in said
    assert said.endswith("False\n")


def test_splits_that_lack_are_told(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"there is train/ but no test/"):
        load_images(str(tmp_path), "train")
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match=r"there is test/ but no train/"):
        check_images(str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no folders; two or more are needed"):
        load_images(str(tmp_path / "empty"), "train")


def test_a_folder_of_images_that_are_not_read_is_told_so(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / name / "photo.gif", CATS[0])
    with pytest.raises(ValueError, match=r"cat holds images of a kind that is not read \(photo"):
        check_images(str(tmp_path))


def broken(root: Path) -> list[Path]:
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    (cat / "a.png").write_bytes(b"")
    (cat / "b.jpg").write_bytes(b"no image")
    for name, kept in (("c.tif", 60), ("d.webp", -40)):
        save(cat / name, CATS[0])
        (cat / name).write_bytes((cat / name).read_bytes()[:kept])
    save(dog / "eps.png", CATS[0], format="EPS")  # Pillow would start a program
    save(dog / "gif.png", CATS[0], format="GIF")
    (dog / "link.png").symlink_to("gone.png")
    names = [cat / n for n in ("a.png", "b.jpg", "c.tif", "d.webp")]
    return [*names, dog / "eps.png", dog / "gif.png", dog / "link.png"]


def test_broken_images_are_told_together_or_left_out(tmp_path: Path) -> None:
    write_set(tmp_path)
    expected = load_images(str(tmp_path), "train")
    paths = broken(tmp_path)
    for read in (check_images, lambda name: load_images(name, "train")):
        with pytest.raises(ValueError, match=r"images cannot be read.*skip_broken=True") as raised:
            read(str(tmp_path))
        assert all(str(p) in str(raised.value) for p in paths if p.suffix in (".png", ".jpg"))
    assert all(str(path) in str(raised.value) for path in paths)  # some only when decoded
    check_images(str(tmp_path), skip_broken=True)
    left = load_images(str(tmp_path), "train", skip_broken=True)
    assert (left.sha256, left.classes) == (expected.sha256, expected.classes)
    for path in (tmp_path / "train" / "dog").iterdir():
        path.rename(path.with_name("x" + path.name)).write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the train images of the class dog can be read"):
        load_images(str(tmp_path), "train", skip_broken=True)
    shutil.rmtree(tmp_path / "train" / "dog")
    save(tmp_path / "train" / "dog" / "0.png", DOGS[0])
    paths = [path for path in paths if path.parent.name != "dog"]
    for i in range(25 - len(paths)):
        (tmp_path / "train" / "cat" / f"x{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"(?s)^25 images cannot .*\.\.\. and 15 more$"):
        load_images(str(tmp_path), "train")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [60_000, 2**31 - 1])
def test_absurd_sizes_are_refused_before_they_fill_memory(tmp_path: Path, side: int) -> None:
    write_set(tmp_path)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (tmp_path / "train" / "cat" / "000.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"cat/000\.png: not a readable image"):
        load_images(str(tmp_path), "train")


def test_a_strip_that_would_be_enormous_is_not_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    save(tmp_path / "train" / "a" / "0.png", random_images(1, 2, 200)[0])
    with_another(tmp_path)
    with pytest.raises(ValueError, match=r"0.png: .*200x2 is too narrow to be brought to 64x64"):
        load_images(str(tmp_path), "train", size=64)
