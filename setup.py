"""Packages of the distribution; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["med3dinsight_ext*"]), "med3dinsight_ext.bundles"],
    package_dir={"med3dinsight_ext.bundles": "bundles"},  # the folder stays at the top level
)
