"""See below: this folder is the package `autoprune.envs`."""

if __name__ == "envs":  # a bare import would load a second copy of every class
    raise ImportError("import autoprune.envs, not envs: the folder is a package of autoprune.")
