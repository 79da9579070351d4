"""rdiff: measures how robust image classifiers are, and proves it."""

from importlib.metadata import version

__version__ = version("robustbench-diffaug")
