"""The data inside the package, and the files of the full set."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune.core.errors import DataError, UnknownName
from autoprune.tasks.data import load_data


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 5_100), ("t10k", 40)):
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28), np.uint8))
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", generator.integers(0, 10, count, np.uint8))
    return tmp_path


def test_embedded_splits_have_their_promised_sizes_and_no_image_in_common() -> None:
    data = load_data("fashion-mnist")
    assert (len(data.train), len(data.validation), len(data.test)) == (8_000, 5_000, 10_000)
    seen = [{image.numpy().tobytes() for image in split.images} for split in (data.train, data.validation)]
    # Fashion-MNIST itself repeats a handful of images.
    assert len(seen[0] & seen[1]) <= 3
    assert torch.bincount(data.validation.labels, minlength=10).min() > 400


def test_normalized_training_images_have_zero_mean_and_unit_variance() -> None:
    data = load_data("fashion-mnist")
    x = data.normalize(data.train.images)
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1.0) < 0.02


def test_full_set_is_read_from_a_folder_and_split_the_same_way_every_time(idx_folder: Path) -> None:
    first, second = load_data("fashion-mnist", idx_folder), load_data("fashion-mnist", idx_folder)
    assert (len(first.train), len(first.validation), len(first.test)) == (100, 5_000, 40)
    assert torch.equal(first.train.images, second.train.images)
    assert first.full


def test_a_truncated_file_is_named(idx_folder: Path) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: not a complete idx file"):
        load_data("fashion-mnist", idx_folder)


def test_a_missing_companion_is_named(idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_data("fashion-mnist", idx_folder)


def test_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data("fashion-mnist", tmp_path / "nowhere")


def test_an_unknown_data_set_gets_a_proposal() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'fashion-mnist'"):
        load_data("fashion-mnst")
