"""Where the packages lie: the top-level folders are subpackages of grn_scale, so no generic name is installed.

Everything else about the distribution stands in pyproject.toml.
"""

from setuptools import find_packages, setup

FOLDERS = ("configs", "data_pipeline", "pretrain", "slurm", "tools")

setup(
    packages=[*find_packages(include=["grn_scale", "grn_scale.*"]), *(f"grn_scale.{folder}" for folder in FOLDERS)],
    package_dir={f"grn_scale.{folder}": folder for folder in FOLDERS},
)
