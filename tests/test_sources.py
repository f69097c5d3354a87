"""Data by name: files of known sets, folders of images, the user's own function, and the options of all of them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import cifar10_folder, cifar100_archive, class_folder, flat_folder, photo
from PIL import Image
from torch import Tensor

from autoprune.core.errors import DataError, UnknownName
from autoprune.tasks.data import DataSet, Split, load_data
from autoprune.tasks.pictures import ImageFiles, read_rgb
from autoprune.tasks.preprocessing import prepared, preprocessing_of
from autoprune.tasks.source import DataName, Options, parse_data, with_options


def disjoint(data: DataSet) -> bool:
    splits = (data.train, data.validation, data.test)
    parts = [{image.numpy().tobytes() for image in split.images[:]} for split in splits]
    return not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_cifar10_is_read_from_its_binary_files(tmp_path: Path) -> None:
    folder = cifar10_folder(tmp_path, 12)
    data = load_data("cifar10", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (48, 12, 12)
    assert (data.classes, len(data.mean), len(data.std)) == (10, 3, 3)
    raw = (folder / "test_batch.bin").read_bytes()
    assert int(data.test.labels[0]) == raw[0]
    assert data.test.images[0].numpy().tobytes() == raw[1:3073]
    assert torch.equal(load_data("cifar10", folder).train.images[:], data.train.images[:])
    assert disjoint(data)


def test_cifar100_is_read_from_its_archive_by_the_fine_labels(tmp_path: Path) -> None:
    cifar100_archive(tmp_path, 20)
    data = load_data("cifar100", tmp_path)
    assert (data.classes, len(data.train), len(data.validation), len(data.test)) == (100, 16, 4, 20)
    assert 0 <= int(data.test.labels.min()) <= int(data.test.labels.max()) < 20


def test_cifar_of_another_length_label_or_form_is_one_line(tmp_path: Path) -> None:
    folder = cifar10_folder(tmp_path)
    path = folder / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"data_batch_2\.bin: 36871 bytes, want a multiple of 3073"):
        load_data("cifar10", tmp_path)
    path.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(DataError, match="label 255"):
        load_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin is missing"):
        load_data("cifar10", tmp_path)
    (tmp_path / "pickled" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(DataError, match="pickled version of CIFAR-10, which runs code"):
        load_data("cifar10", tmp_path / "pickled")
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz.*cannot be read"):
        load_data("cifar100", tmp_path)


def test_mnist_is_read_from_idx_files_where_torchvision_leaves_them(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        for stem, shape in ((f"{part}-images-idx3-ubyte", (count, 28, 28)), (f"{part}-labels-idx1-ubyte", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            values = generator.integers(0, 10, shape, np.uint8)
            (folder / f"{stem}.gz").write_bytes(gzip.compress(header + values.tobytes()))
    data = load_data("mnist", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 10)
    assert data.mean == (0.1307,)


def test_a_folder_without_labels_is_split_into_images_that_are_not_shared(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "photos", 30)
    data = load_data(f"imagefolder:{folder}#size=24")
    assert not data.labelled
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 9, 6)
    assert data.train.images.shape == (15, 3, 24, 24)
    assert disjoint(data)
    again = load_data(f"imagefolder:{folder}#size=24")
    assert torch.equal(again.validation.images[:], data.validation.images[:])
    searched, judged = data.judges(1_000)
    assert (len(searched), len(judged)) == (4, 5)
    assert torch.equal(torch.cat([searched.images[:], judged.images[:]]), data.validation.images[:])


def test_train_and_val_folders_keep_their_images_and_classes(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", ("ant", "bee", "cat"), 6)
    class_folder(tmp_path / "val", ("ant", "bee", "cat"), 4)
    data = load_data(f"imagefolder:{tmp_path}#size=20,mean=0.5,std=0.25")
    assert (data.classes, data.labelled) == (3, True)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 8, 4)
    names = {path.parent.parent.name for path in data.train.images.paths}  # type: ignore[union-attr]
    assert names == {"train"}
    for path, label in zip(data.test.images.paths, data.test.labels, strict=True):  # type: ignore[union-attr]
        assert path.parent.name == ("ant", "bee", "cat")[int(label)]
    x = data.normalize(data.test.images)
    assert torch.allclose(x, (data.test.images[:].float() / 255 - 0.5) / 0.25, atol=1e-6)


def test_of_a_large_folder_only_what_is_asked_for_is_decoded(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, 40)
    data = load_data(f"imagefolder:{folder}#size=16,train=10,validation=6,test=2")
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 6, 2)
    files = data.train.images
    assert isinstance(files, ImageFiles)
    first = files[:3]
    for path in files.paths[:3]:
        path.unlink()
    assert torch.equal(files[:3], first)
    with pytest.raises(DataError, match="no complete image"):
        data.train.part(3).images[torch.tensor([0, 0])] if not files.paths[3].unlink() else None


def test_all_training_images_are_there_for_a_training_and_none_is_kept(tmp_path: Path) -> None:
    class_folder(tmp_path, ("a", "b"), 20)
    part, whole = (load_data(f"imagefolder:{tmp_path}#size=16", full=full) for full in (False, True))
    assert len(whole.train) == 20
    assert whole.full
    index = torch.tensor([3, 1])
    assert torch.equal(whole.train.images[index], part.train.images[index])
    files = whole.train.images
    assert isinstance(files, ImageFiles)
    files.paths[1].unlink()
    with pytest.raises(DataError):
        files[index]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "CMYK", "I;16", "1"])
def test_every_kind_of_image_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16") else "image.png")
    picture = photo(1)
    if mode == "I;16":
        Image.fromarray(np.arange(40 * 52, dtype=np.uint16).reshape(40, 52)).save(path)
    else:
        picture.convert(mode).save(path, **({"transparency": 3} if mode == "P" else {}))
    pixels = read_rgb(path)
    assert (pixels.shape, pixels.dtype) == ((3, 40, 52), torch.uint8)
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_the_middle_of_the_resized_image_is_what_torchvision_cuts_out(tmp_path: Path) -> None:
    from torchvision.transforms import v2

    folder = flat_folder(tmp_path, 20)
    data = load_data(f"imagefolder:{folder}#size=24,resize=32,interpolation=bicubic")
    files = data.test.images
    assert isinstance(files, ImageFiles)
    want = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(24)])(read_rgb(files.paths[0]))
    assert torch.equal(files[:1][0], want)


FOLDER_FAULTS = {
    "absent": "no such folder",
    "few": "9 images, at least 16 are needed",
    "none": "0 images, at least 16 are needed",
    "mixed": "images (000.png, …) beside folders (bee, …)",
    "text": "007.png: no image (not of a known format); remove it",
    "empty-class": "bee: no images in this class's folder",
    "no-val": "there is 'train' but no 'val' beside it",
    "classes": "class folder 'cow' is not in 'train'",
    "half-labelled": "one of it and its 'train' has class folders",
}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    flat_folder(tmp_path / "few", 9)
    (tmp_path / "none").mkdir()
    class_folder(flat_folder(tmp_path / "mixed", 3), ("bee",), 3)
    flat_folder(tmp_path / "text", 30)
    (tmp_path / "text" / "007.png").write_text("no picture")
    (class_folder(tmp_path / "empty-class", ("ant",), 9) / "bee").mkdir()
    class_folder(tmp_path / "no-val" / "train", ("ant",), 9)
    class_folder(tmp_path / "classes" / "train", ("ant", "bee"), 9)
    class_folder(tmp_path / "classes" / "val", ("ant", "bee", "cow"), 9)
    class_folder(tmp_path / "half-labelled" / "train", ("ant", "bee"), 9)
    flat_folder(tmp_path / "half-labelled" / "val", 9)
    return tmp_path


@pytest.mark.parametrize("name", FOLDER_FAULTS)
def test_a_folder_that_will_not_do_is_told_in_one_line(name: str, faulty: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data(f"imagefolder:{faulty / name}")
    assert FOLDER_FAULTS[name] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_image_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, 20, suffix=".jpg")
    data = load_data(f"imagefolder:{folder}#size=16")
    files = data.test.images
    assert isinstance(files, ImageFiles)
    path = files.paths[2]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match=rf"{path.name}: no complete image"):
        data.test.digest()


def test_imagenet_asks_for_its_thousand_classes(tmp_path: Path) -> None:
    class_folder(tmp_path / "few", ("n01", "n02"), 9)
    with pytest.raises(DataError, match=r"2 class folders, ImageNet has 1,000; for a part of it.*imagefolder:"):
        load_data(f"imagenet:{tmp_path / 'few'}")
    flat_folder(tmp_path / "flat", 20)
    with pytest.raises(DataError, match="no class folders"):
        load_data(f"imagenet:{tmp_path / 'flat'}")
    for split, count in (("train", 1), ("val", 1)):
        class_folder(tmp_path / "whole" / split, tuple(f"n{number:04d}" for number in range(1_000)), count)
    data = load_data(f"imagenet:{tmp_path / 'whole'}#train=30,validation=20,test=10")
    assert (data.classes, len(data.train), len(data.validation), len(data.test)) == (1_000, 30, 20, 10)
    assert int(data.train.labels.max()) > 100


FACTORY = """
import torch
from autoprune.tasks.data import DataSet, Split

def part(count):
    return Split(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.zeros(count, dtype=torch.long))

def made():
    return DataSet("mine", 2, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0), part(9), part(4), part(2), full=True)

def wrong():
    return 3

def failing():
    raise ValueError("no disk\\nmore")

constant = 3
"""


def test_the_users_own_function_gives_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_data.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    data = load_data("my_own_data:made")
    assert (data.name, len(data.train)) == ("mine", 9)
    assert len(load_data("my_own_data:made#train=4,size=4").train.images[0, 0]) == 4
    for name, part in {
        "wrong": "the function returned a int; want an autoprune.tasks.data.DataSet",
        "failing": "the function failed: ValueError: no disk",
        "constant": "'constant' is a int",
    }.items():
        with pytest.raises(DataError, match=part):
            load_data(f"my_own_data:{name}")
    with pytest.raises(UnknownName, match="Did you mean 'made'"):
        load_data("my_own_data:mde")
    with pytest.raises(DataError, match="no module 'my_other_data' here"):
        load_data("my_other_data:made")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cifar", "no data set 'cifar'. Did you mean 'cifar10'?"),
        ("imagefoldr:photos", "no data set 'imagefoldr:DIR'. Did you mean 'imagefolder:DIR'?"),
        ("imagenet", "which folder? Write imagenet:DIR"),
        ("cifar10#sise=3", "no data option 'sise'. Did you mean 'size'?"),
        ("cifar10#size", "write it as size=VALUE"),
        ("cifar10#size=0", "size=0: must be at least 1"),
        ("cifar10#size=big", "size=big: must be a whole number"),
        ("cifar10#mean=0.5/x", "must be numbers, one a channel"),
        ("cifar10#std=0", "must be numbers above 0"),
        ("cifar10#interpolation=bicubc", "Did you mean 'bicubic'?"),
    ],
)
def test_a_name_that_cannot_be_read_says_what_could(text: str, part: str) -> None:
    with pytest.raises((UnknownName, DataError)) as caught:
        parse_data(text)
    assert part in str(caught.value)


def test_options_must_fit_the_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mean: 3 numbers for images of 1 channels"):
        load_data("fashion-mnist#mean=0.1/0.2/0.3")
    folder = flat_folder(tmp_path, 20)
    with pytest.raises(DataError, match="std: 2 numbers for images of 3 channels"):
        load_data(f"imagefolder:{folder}#std=0.1/0.2")
    with pytest.raises(DataError, match="resize=10: below size=20"):
        load_data(f"imagefolder:{folder}#size=20,resize=10")


def test_options_resize_cut_and_shift_what_is_in_memory() -> None:
    data = load_data("fashion-mnist#size=14,train=20,validation=10,test=5,mean=0.5,std=0.5")
    assert data.train.images.shape == (20, 1, 14, 14)
    assert (len(data.validation), len(data.test), data.full) == (10, 5, False)
    assert float(data.normalize(torch.zeros(1, 1, 14, 14, dtype=torch.uint8)).max()) == -1.0


_numbers = st.tuples(*[st.floats(0.125, 1.0, width=16)] * 3)


@given(
    size=st.none() | st.integers(1, 999),
    mean=st.none() | _numbers,
    train=st.none() | st.integers(1, 10**6),
    interpolation=st.none() | st.sampled_from(["bilinear", "bicubic", "nearest"]),
)
def test_a_name_with_options_reads_back_the_same(
    size: int | None, mean: tuple[float, ...] | None, train: int | None, interpolation: str | None
) -> None:
    options = Options(size=size, mean=mean, train=train, interpolation=interpolation)  # type: ignore[arg-type]
    name = DataName("imagefolder", "some/where", options)
    assert parse_data(name.text).text == name.text
    assert parse_data(name.text).where == "some/where"


def test_given_options_win_over_the_networks_own(tmp_path: Path) -> None:
    own = preprocessing_of("torchvision:resnet50")
    assert (own.size, own.resize, own.interpolation) == (224, 232, "bilinear")
    assert own.mean == (0.485, 0.456, 0.406)
    text = prepared("imagefolder:x#size=112,mean=0.5", "torchvision:resnet50")
    options = parse_data(text).options
    assert (options.size, options.resize, options.mean) == (112, 116, (0.5,))
    assert options.std == (0.229, 0.224, 0.225)
    assert parse_data(prepared("imagefolder:x", "resnet20")).options.size == 32
    assert parse_data(prepared("imagefolder:x", "resnet20@3x64x64")).options.size == 64
    assert prepared("cifar10", "torchvision:resnet50") == "cifar10"
    assert with_options("cifar10#size=3", ["size=4", "train=9"]) == "cifar10#size=4,train=9"


def test_timms_own_preprocessing_is_used() -> None:
    pytest.importorskip("timm")
    own = preprocessing_of("timm:efficientnet_lite0")
    assert (own.size, own.resize, own.interpolation) == (224, 256, "bicubic")
    assert preprocessing_of("timm:no_such_network") == Options()
    assert preprocessing_of("my.module:factory") == Options()


def test_a_search_needs_two_validation_images() -> None:
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    one = Split(images, torch.zeros(1, dtype=torch.long))
    data = DataSet("small", 2, (0.5,), (1.0,), one, one, one, full=True)
    with pytest.raises(DataError, match="1 validation images, a search needs at least 2"):
        data.judges(10)


def test_a_digest_tells_images_apart_and_not_how_they_are_kept(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path, 20)
    data = load_data(f"imagefolder:{folder}#size=16")
    pixels: Tensor = data.train.images[:]
    assert Split(pixels, data.train.labels).digest() == data.train.digest()
    pixels[0, 0, 0, 0] ^= 1
    assert Split(pixels, data.train.labels).digest() != load_data(f"imagefolder:{folder}#size=16").train.digest()
