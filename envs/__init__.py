"""See below: this folder is the package `autoprune.envs`."""

if __name__ == "envs":  # a bare import would load a second copy of every class
    raise ImportError("import autoprune.envs, not envs: the folder is a package of autoprune.")

from gymnasium.envs.registration import register as _register

# By name only: the environment's module is imported when gymnasium.make builds it.
_register(id="autoprune/PruningEnv-v0", entry_point="autoprune.envs.pruning_env:PruningEnv")
