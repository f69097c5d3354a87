"""See below: this folder is the package `autoprune.kernels`."""

if __name__ == "kernels":  # a bare import would load a second copy of every class
    raise ImportError("import autoprune.kernels, not kernels: the folder is a package of autoprune.")
