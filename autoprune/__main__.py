"""``python -m autoprune``: the command line, in the form that torchrun takes."""

from autoprune.cli.main import main

if __name__ == "__main__":
    main()
