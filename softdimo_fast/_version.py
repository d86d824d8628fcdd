"""The package's version, read by the build and by `softdimo_fast.__version__`."""

__version__ = "0.1.0"
