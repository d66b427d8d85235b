"""From the ImageNet archives to a table of trained backbones, on a Slurm cluster or one machine."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hpc-imagenet")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
