"""`grn-scale doctor`: what is installed, what is missing, what is the wrong thing, and how to get it.

Packages are imported in processes of their own, so that a broken binary is reported and ends nothing. What is
needed follows from the requirements of the installed distribution; nothing is listed a second time here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from grn_scale import __version__
from grn_scale.command_line import CommandParser, run
from grn_scale.errors import EXIT_FAILED

FOUND, MISSING, WRONG = "found", "missing", "wrong"
IMPORT_NAMES = {"megatron-core": "megatron.core", "pyyaml": "yaml", "pillow": "PIL"}
"""Module of a distribution where it is not the distribution's own name."""
IMPORT_LIMIT_SECONDS = 180
MINIMUM_FREE_GIB = 5
INSTALL = "make setup, or pip install -e . in the checkout"
TORCH_FACTS = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available(),
                  "devices": [f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices]}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """found, missing or wrong."""
    detail: str
    needed: bool
    remedy: str = ""
    """How to get it or mend it; empty where nothing is to be done."""


@dataclass(frozen=True)
class Probe:
    """What a child process said: its stdout, or the last line of its error."""

    ok: bool
    text: str


def probe(code: str) -> Probe:
    """Run Python code in a child that sees this process's import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment,
                              timeout=IMPORT_LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Probe(False, f"did not end within {IMPORT_LIMIT_SECONDS} s")
    if done.returncode == 0:
        return Probe(True, done.stdout.strip())
    lines = done.stderr.strip().splitlines()
    return Probe(False, lines[-1] if lines else f"ended with status {done.returncode}")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Finding:
    """The interpreter."""
    legal = sys.version_info >= (3, 11)
    return Finding("python", FOUND if legal else WRONG, f"{platform.python_version()} at {sys.executable}", True,
                   "" if legal else "make an environment with Python 3.11 or newer")


def check_requirements() -> list[Finding]:
    """A finding for each distribution that grn_scale requires, torch first."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("packaging", MISSING, "and with it probably every other requirement", True, INSTALL)]
    try:
        texts = importlib.metadata.requires("grn-scale") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("grn-scale", MISSING, "runs from a folder, not from an installation", True, INSTALL)]
    requirements = [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(_check_requirement, requirements))


def _check_requirement(requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    install = f"pip install '{name}{requirement.specifier}'"
    version = installed_version(name)
    if version is None:
        return Finding(name, MISSING, f"needs {wanted}", True, install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, WRONG, f"{version}, needs {wanted}", True, install)
    imported = probe(f"import {IMPORT_NAMES.get(name, name.replace('-', '_'))}")
    if not imported.ok:
        return Finding(name, WRONG, f"{version}, but importing it fails: {imported.text}", True,
                       f"pip install --force-reinstall '{name}=={version}'")
    return Finding(name, FOUND, version, True)


def check_cuda() -> Finding:
    """CUDA devices as torch sees them, and which build torch is."""
    facts = probe(TORCH_FACTS)
    if not facts.ok:
        return Finding("CUDA", MISSING, "cannot ask: torch does not import", False, "install torch first")
    torch = json.loads(facts.text.splitlines()[-1])
    if torch["available"] and torch["devices"]:
        return Finding("CUDA", FOUND, f"torch for CUDA {torch['cuda']}; {'; '.join(torch['devices'])}", False)
    if torch["cuda"] is None:
        return Finding("CUDA", MISSING, f"torch {torch['version']} is a build for CPU", False,
                       "for GPUs: the command that https://pytorch.org/get-started/locally gives")
    return Finding("CUDA", MISSING, f"torch is a build for CUDA {torch['cuda']}, but finds no device", False,
                   "check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES")


def check_apex() -> Finding:
    """NVIDIA apex, told apart from the unrelated web toolkit of that name on PyPI without importing either."""
    source = "build it from https://github.com/NVIDIA/apex; it is not on PyPI"
    spec = importlib.util.find_spec("apex")
    version = installed_version("apex")
    if spec is None and version is None:
        return Finding("apex", MISSING, "", False, source)
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("apex", WRONG, f"{version or 'a module'}: PyPI's web toolkit of that name, not NVIDIA's", False,
                       f"pip uninstall apex, then {source}")
    return _check_import("apex", "apex.optimizers", version, f"pip uninstall apex, then {source}")


def check_optional(name: str, module: str, distributions: tuple[str, ...], remedy: str) -> Finding:
    """An optional Python package; a binary built for another torch shows as wrong."""
    version = next(filter(None, map(installed_version, distributions)), None)
    if version is None and importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(name, MISSING, "", False, remedy)
    return _check_import(name, module, version, remedy)


def _check_import(name: str, module: str, version: str | None, remedy: str) -> Finding:
    imported = probe(f"import {module}")
    label = version or "of unknown version"
    if not imported.ok:
        return Finding(name, WRONG, f"{label}, but importing {module} fails: {imported.text}", False, remedy)
    return Finding(name, FOUND, label, False)


def check_slurm() -> Finding:
    """sbatch, which `grn-scale` needs on clusters only."""
    path = shutil.which("sbatch")
    if path is None:
        return Finding("Slurm", MISSING, "no sbatch on PATH", False, "only on clusters; torchrun starts jobs elsewhere")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding("Slurm", FOUND if done.returncode == 0 else WRONG, (done.stdout or done.stderr).strip(), False,
                   "" if done.returncode == 0 else "ask the cluster's administrators: sbatch --version fails")


def check_compiler() -> Finding:
    """A C++ compiler, which only optional compiled operators use."""
    path = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return Finding("C++ compiler", FOUND if path else MISSING, path or "not needed", False)


def check_disk(folder: Path) -> Finding:
    """Free space where the command runs."""
    gib = shutil.disk_usage(folder).free / 2**30
    enough = gib >= MINIMUM_FREE_GIB
    return Finding("free disk", FOUND if enough else WRONG, f"{gib:.1f} GiB in {folder}", False,
                   "" if enough else f"free {MINIMUM_FREE_GIB} GiB, or write elsewhere with output=FOLDER")


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the report."""
    yield check_python()
    yield from check_requirements()
    yield check_cuda()
    yield check_apex()
    yield check_optional("flash-attn", "flash_attn", ("flash-attn",),
                         "pip install flash-attn --no-build-isolation (CUDA machine with nvcc)")
    yield check_optional("Transformer Engine", "transformer_engine.pytorch", ("transformer-engine",),
                         "pip install --no-build-isolation 'transformer-engine[pytorch]' (CUDA machine)")
    yield check_optional("wandb", "wandb", ("wandb",), "pip install 'grn-scale[wandb]'")
    yield check_optional("scikit-image", "skimage.metrics", ("scikit-image",), "pip install 'grn-scale[evaluate]'")
    yield check_optional("torchvision", "torchvision", ("torchvision",),
                         "of torch's release and index; pip install 'grn-scale[torchvision]'")
    yield check_slurm()
    yield check_compiler()
    yield check_disk(Path.cwd())


def report(findings: list[Finding]) -> None:
    """Print the findings as a table, then what to do about them; plain lines where rich is what is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for finding in findings:
            print(f"{finding.name}: {finding.state} ({_need(finding)}) {finding.detail}".rstrip())
    else:
        table = Table("what", "state", "", "version or reason")
        table.columns[-1].overflow = "fold"
        for finding in findings:
            bad = "red" if finding.needed or finding.state == WRONG else "yellow"
            colour = "green" if finding.state == FOUND else bad
            table.add_row(finding.name, Text(finding.state, colour), _need(finding), Text(finding.detail))
        Console().print(table)
    print("how to get or mend it:")
    for finding in findings:
        if finding.remedy:
            print(f"  {finding.name} ({_need(finding)}): {finding.remedy}")


def _need(finding: Finding) -> str:
    return "needed" if finding.needed else "optional"


def main(argv: list[str]) -> int:
    """Exit code 1 where something needed is missing or wrong, otherwise 0."""
    parser = CommandParser("doctor", "Say what was found, what is missing and how to get it. CUDA, apex, flash-attn, "
                           "Transformer Engine, wandb,\nscikit-image, torchvision, Slurm and a compiler are optional.",
                           "grn-scale doctor", configured=False, json=True)
    options = parser.parse_options(argv)
    print("importing each package in a process of its own; this takes some seconds", file=sys.stderr, flush=True)
    findings = list(examine())
    broken = [finding for finding in findings if finding.needed and finding.state != FOUND]
    if options.json:
        document = {"version": __version__, "ok": not broken, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2))
    else:
        report(findings)
        print(f"needed and not in order: {', '.join(f.name for f in broken)}" if broken
              else "everything needed is here")
    return EXIT_FAILED if broken else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
