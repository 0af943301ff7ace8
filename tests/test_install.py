"""The command outside of a checkout: the wheel brings conf/ and sweeps/, and a working folder may add options."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import massdpo
from tests.conftest import ROOT

SMALL = [
    *("dataset.num_train=16", "dataset.num_val=4", "dataset.num_test=4", "logger=none", "k=2"),
    *("trainer.sft.epochs=1", "trainer.preference.epochs=1", "trainer.threads=1"),
]


def call(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MASSDPO_CACHE")}
    return subprocess.run(command, cwd=folder, env=clean | variables, capture_output=True, text=True, timeout=300)


def test_without_the_packages_the_command_that_installs_them_is_named(tmp_path: Path) -> None:
    done = call([sys.executable, "-S", str(ROOT / "run.py")], tmp_path)  # -S: no installed packages
    assert done.returncode == 1 and "make setup" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel; what it depends on is lent from this one."""
    home = tmp_path_factory.mktemp("installed")
    source = home / "source"  # setuptools leaves its build beside what it builds
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.rstrip("\0").split("\0"):
        if name.split("/")[0] in ("massdpo", "conf", "sweeps", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home), str(source)]
    done = call(build, home)
    assert done.returncode == 0, done.stderr
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv")
    done = call([*pip, "--python", str(home / "venv" / "bin" / "python"), "install", "--no-deps", str(wheel)], home)
    assert done.returncode == 0, done.stderr
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "venv" / "bin"


@pytest.mark.slow
def test_the_installed_command_runs_anywhere(installed: Path, tmp_path: Path) -> None:
    where = call([str(installed / "python"), "-c", "import massdpo; print(massdpo.__file__)"], tmp_path)
    assert str(installed.parent) in where.stdout, "the wheel's own package is what runs"
    version = call([str(installed / "massdpo"), "--version"], tmp_path)
    assert version.stdout == f"massdpo {massdpo.__version__}\n"
    (tmp_path / "conf" / "selector").mkdir(parents=True)
    (tmp_path / "conf" / "selector" / "mine.yaml").write_text("_target_: mine.First\nk: ${k}\n")
    (tmp_path / "mine.py").write_text(
        "from massdpo.selection import Full\n\n\nclass First(Full):\n    pass\n".replace(
            "    pass", "    def __init__(self, k: int):\n        super().__init__()"
        )
    )
    home = f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"
    for command in ([str(installed / "massdpo")], [str(installed / "python"), "-m", "massdpo"]):
        for selector in ("mass", "mine"):
            done = call([*command, *SMALL, *home, f"selector={selector}", "force=true"], tmp_path)
            assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
    listed = call([str(installed / "massdpo"), "-m", "sweeps=demo", "size=nosuch", *home], tmp_path)
    assert listed.returncode == 2 and "size" in listed.stderr, "sweeps/ is found, and its jobs are checked"
