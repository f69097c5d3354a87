"""A small network on real images, and dense references without the slow compilers: whole pipelines within seconds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from networks import settled
from torch import nn

from autoprune.kernels.dense import dense_references
from autoprune.tasks.data import DataSet, load_data
from autoprune.tasks.task import Task


def small_data(images: int = 256) -> DataSet:
    """The embedded data set, cut short."""
    full = load_data("fashion-mnist")
    return replace(full, train=full.train.take(images), validation=full.validation.take(images),
                   test=full.test.take(images))


def small_task() -> Task:
    """Four convolutions (3x3 and 1x1) and a classifier, untrained but with lively BatchNorms."""
    torch.manual_seed(0)
    widths = ((1, 16, 3, 2), (16, 32, 3, 2), (32, 32, 3, 1), (32, 64, 1, 1))
    layers: list[nn.Module] = []
    for channels, filters, window, stride in widths:
        conv = nn.Conv2d(channels, filters, window, stride, window // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
    model = settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))
    data = small_data()
    return Task("fashion-mnist", "small", model, data.normalize(data.validation.images[:1]), data)


@contextmanager
def quick_measurements() -> Iterator[None]:
    """Time our own dense plan alone as the reference, and calibrate on few networks."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(dense_references, only=("plan",), compile=False)
        patch.setattr("autoprune.search.deploy.dense_references", lambda *a, **k: quick(*a, **{**k, "only": ("plan",)}))
        patch.setattr("autoprune.search.latency.CALIBRATION_NETWORKS", 8)
        patch.setattr("autoprune.search.deploy.REFERENCE_SECONDS", 0.3)
        patch.setattr("autoprune.search.deploy.SECONDS_A_NETWORK", 0.05)
        yield
