"""doctor tells found from missing from wrong, and ends with 1 only for what is needed."""

import json
import subprocess
import sys

import pytest

from grn_scale import doctor
from grn_scale.doctor import FOUND, MISSING, WRONG, Finding


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in front of the import path, to install made-up distributions into."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version, files):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

    return install


def test_pypi_web_toolkit_called_apex_is_recognised_as_the_wrong_one(site):
    site("apex", "0.9.10.dev0", {"apex/__init__.py": "raise ImportError('pyramid')", "apex/lib/flash.py": "",
                                 "apex/models.py": ""})
    finding = doctor.check_apex()
    assert finding.state == WRONG and not finding.needed
    assert "web toolkit" in finding.detail and "pip uninstall apex" in finding.remedy


def test_nvidia_apex_is_found(site):
    site("apex", "0.1", {"apex/__init__.py": "", "apex/optimizers/__init__.py": ""})
    assert doctor.check_apex() == Finding("apex", FOUND, "0.1", False)


def test_nvidia_apex_built_for_another_torch_is_wrong_with_the_reason(site):
    site("apex", "0.1", {"apex/__init__.py": "",
                         "apex/optimizers/__init__.py": "raise ImportError('undefined symbol: x')"})
    finding = doctor.check_apex()
    assert finding.state == WRONG and "undefined symbol: x" in finding.detail


def test_optional_package_is_missing_found_or_broken(site):
    arguments = ("flash-attn", "made_up_attention", ("made-up-attention",), "pip install it")
    assert doctor.check_optional(*arguments) == Finding("flash-attn", MISSING, "", False, "pip install it")
    site("made-up-attention", "2.0", {"made_up_attention.py": ""})
    assert doctor.check_optional(*arguments) == Finding("flash-attn", FOUND, "2.0", False)


def test_package_that_ends_its_process_is_reported_and_ends_nothing(site):
    site("made-up-crash", "1.0", {"made_up_crash.py": "import os; os.abort()"})
    finding = doctor.check_optional("crash", "made_up_crash", ("made-up-crash",), "reinstall")
    assert finding.state == WRONG and "ended with status" in finding.detail


def test_required_distribution_of_another_version_or_absent_is_wrong_or_missing(site):
    from packaging.requirements import Requirement

    site("made-up-need", "1.5", {"made_up_need.py": ""})
    assert doctor._check_requirement(Requirement("made-up-need>=1,<2")).state == FOUND
    old = doctor._check_requirement(Requirement("made-up-need>=2"))
    assert (old.state, old.detail, old.needed) == (WRONG, "1.5, needs >=2", True)
    absent = doctor._check_requirement(Requirement("made-up-absent>=2"))
    assert absent.state == MISSING and absent.remedy == "pip install 'made-up-absent>=2'"


def test_cuda_line_says_which_build_torch_is():
    finding = doctor.check_cuda()
    assert not finding.needed and finding.state in (FOUND, MISSING) and "torch" in finding.detail


@pytest.mark.parametrize(("findings", "code"), [
    ([Finding("a", FOUND, "1", True), Finding("b", MISSING, "", False, "get b"), Finding("c", WRONG, "2", False)], 0),
    ([Finding("a", MISSING, "", True, "get a")], 1),
    ([Finding("a", WRONG, "0", True, "get a")], 1),
])
def test_exit_code_is_1_only_where_something_needed_is_not_in_order(findings, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert doctor.main([]) == code
    text = capsys.readouterr().out
    assert all(finding.name in text and finding.remedy in text for finding in findings)
    assert doctor.main(["--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0) and len(document["findings"]) == len(findings)


def test_doctor_speaks_where_no_requirement_is_installed():
    """A bare interpreter with nothing but the package's own files: no yaml, rich, packaging or torch."""
    code = "import sys; from grn_scale.cli import main; raise SystemExit(main(['doctor']))"
    root = doctor.__file__.rsplit("/", 2)[0]
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, env={"PATH": "/bin:/usr/bin"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "packaging: missing (needed)" in done.stdout and "needed and not in order: packaging" in done.stdout
