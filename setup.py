"""What pyproject.toml cannot say: conf/ and sweeps/, which lie beside the package, go into it when it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["massdpo*"]), "massdpo.conf", "massdpo.sweeps"],
    package_dir={"massdpo.conf": "conf", "massdpo.sweeps": "sweeps"},
    package_data={"massdpo.conf": ["**/*.yaml"], "massdpo.sweeps": ["*.yaml"]},
)
