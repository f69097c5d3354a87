"""All methods: importing a method's module is what registers it."""

from autoprune.trainers import (
    admm,
    campfire,
    clicktrain,
    deepr,
    dynamic,
    ese,
    lottery,
    magnitude,
    nest,
    nm,
    prunetrain,
    slimming,
    snip,
    ssl,
)

MODULES = (
    admm, campfire, clicktrain, deepr, dynamic, ese, lottery, magnitude, nest, nm, prunetrain, slimming, snip, ssl,
)  # fmt: skip
