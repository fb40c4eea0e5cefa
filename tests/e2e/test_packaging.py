"""What an installation puts where: built as a wheel and installed into a fresh environment, without a compiler."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("grn_scale", "configs", "data_pipeline", "pretrain", "slurm", "tools", "pyproject.toml", "setup.py",
           "README.md")
pytestmark = pytest.mark.slow


def call(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Wheel built from a copy of the sources, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    names = call("git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES, cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "src")
    (built,) = folder.glob("grn_scale-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Interpreter of a fresh environment that holds the wheel; its dependencies are lent from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    call(interpreter, "-m", "pip", "install", "--no-deps", wheel)
    return interpreter


def run_outside(python, *arguments):
    """Output of the fresh interpreter in an empty folder, with this environment's packages behind its own."""
    import yaml

    lent = Path(yaml.__file__).parents[1]
    return call(python, *arguments, cwd=python.parent, env={"PYTHONPATH": str(lent), "PATH": str(python.parent)})


def test_wheel_holds_one_top_level_name_and_every_file_that_is_read_at_run_time(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"grn_scale"}
    wanted = {f"grn_scale/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "grn_scale").rglob("*.safetensors")}
    assert wanted and wanted <= set(names)


def test_installation_puts_no_generic_name_into_site_packages(python):
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    names = {path.name for path in site.iterdir()}
    assert "grn_scale" in names
    assert not names & {"tools", "tests", "slurm", "configs", "pretrain", "data_pipeline"}


def test_installed_package_imports_its_folders_and_finds_its_configurations(python):
    code = ("import grn_scale.data_pipeline, grn_scale.pretrain, grn_scale.tools, grn_scale.slurm, sys\n"
            "from grn_scale.config.load import shipped_file, load_config\n"
            "print(shipped_file('model/grn_tiny.yaml'))\n"
            "print(load_config(None, ['model=model/grn_8b.yaml']).model.hidden_size)")
    path, size = run_outside(python, "-c", code).splitlines()
    assert Path(path).is_relative_to(python.parents[1]) and size == "4096"


def test_installed_command_runs(python):
    assert "usage: grn-scale COMMAND" in call(python.parent / "grn-scale", "--help")
    assert "usage: grn-scale train" in run_outside(python, "-m", "grn_scale", "train", "--help")
