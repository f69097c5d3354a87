"""All methods: importing a method's module is what registers it."""

from autoprune.trainers import (
    admm,
    campfire,
    clicktrain,
    dynamic,
    ese,
    lottery,
    magnitude,
    nm,
    prunetrain,
    slimming,
    snip,
)

MODULES = (admm, campfire, clicktrain, dynamic, ese, lottery, magnitude, nm, prunetrain, slimming, snip)
