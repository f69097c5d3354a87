"""See below: this folder is the package `autoprune.search_spaces`."""

if __name__ == "search_spaces":  # a bare import would load a second copy of every class
    raise ImportError("import autoprune.search_spaces, not search_spaces: the folder is a package of autoprune.")
