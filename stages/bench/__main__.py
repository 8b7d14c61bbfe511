"""The command `python -m stages.bench`."""

from stages.bench import main

if __name__ == "__main__":
    main()
