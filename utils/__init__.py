"""Programs, which are run with `python -m utils.NAME`, and the packages that they and the scripts are made of."""

__version__ = "0.2"   # in every checkpoint and results file
