"""Entry point of `python -m hpc_imagenet`."""

from hpc_imagenet.cli.main import main

if __name__ == "__main__":
    main()
