"""Package list of the ``src`` → ``shoal`` mapping; the rest of the metadata is in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=["shoal", *(f"shoal.{name}" for name in find_packages("src"))])
