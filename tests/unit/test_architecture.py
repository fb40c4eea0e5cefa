"""Which part may know which, and a few things no part may do: checked over the syntax trees, nothing is imported."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from grn_scale.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM_FOLDERS = {"pretrain", "data_pipeline", "tools", "slurm"}
PROGRAMS = {command.module for command in COMMANDS} | {"grn_scale.cli", "grn_scale.__main__"}
FOUNDATION = {"errors", "atomic", "storage", "leases", "keyed", "batch", "hbq", "config"}
"""What every folder may import."""
ARROWS = {
    "config": set(),
    "perf": set(),
    "planning": {"perf"},
    "studies": {"command_line", "planning"},
    "model": set(),
    "tokenizer": set(),
    "checkpoint": set(),
    "data": {"tokenizer"},
    "parallel": {"model", "class_to_image", "checkpoint"},
    "sampling": {"data", "model", "tokenizer", "checkpoint"},
    "class_to_image": {"model", "sampling", "checkpoint"},
    "train": {"data", "checkpoint", "parallel", "model", "perf"},
    "convert": {"model", "tokenizer", "checkpoint", "class_to_image"},
    "evaluation": {"data", "model", "class_to_image", "tokenizer", "sampling", "checkpoint", "command_line"},
    "demo": {"data", "tokenizer", "sampling", "evaluation", "train", "model", "checkpoint", "command_line"},
}
"""Folder of grn_scale -> what it may import beside itself and the foundation. Programs may import anything."""
LAZY_ARROWS = {
    "model": {"checkpoint"},
    "tokenizer": {"checkpoint"},
    "planning": {"command_line"},
    "perf": {"checkpoint", "command_line", "data", "demo", "model", "parallel", "planning", "tokenizer"},
}
"""What a folder may import inside a function only."""
LIBRARIES = {"megatron": "parallel", "deepspeed": "parallel", "wandb": "train"}
"""Library -> the one folder that may import it."""
LONGEST_FILE_LINES = 400


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_import: bool
    """Runs when the file is imported, not inside a function."""


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """Imports of a file, those that only a type checker runs left out."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_import = False
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports from grn_scale on"
            found.append(Import(node.module, node.lineno, at_import))
            if node.module == "grn_scale":
                found.extend(Import(f"grn_scale.{alias.name}", node.lineno, at_import) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(tree(path), True)
    return found


def module_name(path):
    relative = path.relative_to(ROOT).with_suffix("")
    return ".".join(("grn_scale", *relative.parts) if relative.parts[0] != "grn_scale" else relative.parts)


def part(module):
    """`data` for grn_scale.data.plan; None for other projects' modules and the package itself."""
    names = module.split(".")
    return names[1] if names[0] == "grn_scale" and len(names) > 1 else None


def test_the_library_never_imports_the_programs():
    wrong = [f"{path.relative_to(ROOT)}:{found.line}: {found.module}" for path in sources("grn_scale")
             for found in imports(path) if part(found.module) in PROGRAM_FOLDERS]
    assert wrong == []


def test_nothing_imports_the_tests_or_a_program_folder_by_its_bare_name():
    bare = PROGRAM_FOLDERS | {"tests", "configs"}
    wrong = [f"{path.relative_to(ROOT)}:{found.line}: {found.module}" for path in sources("grn_scale", *PROGRAM_FOLDERS)
             for found in imports(path) if found.module.split(".")[0] in bare]
    assert wrong == []


@pytest.mark.parametrize("folder", sorted(ARROWS))
def test_folder_imports_only_what_it_may_know(folder):
    legal = ARROWS[folder] | FOUNDATION | {folder, "__version__"}
    wrong = [f"{path.relative_to(ROOT)}:{found.line}: {found.module}" for path in sources(f"grn_scale/{folder}")
             if module_name(path) not in PROGRAMS
             for found in imports(path) if part(found.module) and part(found.module) not in legal
             and (found.at_import or part(found.module) not in LAZY_ARROWS.get(folder, ()))]
    assert wrong == []


def test_every_folder_of_the_library_has_its_arrows():
    assert {path.name for path in (ROOT / "grn_scale").iterdir() if (path / "__init__.py").is_file()} == set(ARROWS)


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_library_is_known_to_one_folder(library):
    home = f"grn_scale/{LIBRARIES[library]}/"
    wrong = [f"{path.relative_to(ROOT)}:{found.line}" for path in sources("grn_scale", *PROGRAM_FOLDERS)
             if not str(path.relative_to(ROOT)).startswith(home)
             for found in imports(path) if found.module.split(".")[0] == library]
    assert wrong == []


def test_configuration_and_errors_need_the_standard_library_and_yaml_only():
    legal = sys.stdlib_module_names | {"yaml", "grn_scale"}
    wrong = [f"{path.relative_to(ROOT)}:{found.line}: {found.module}"
             for path in [*sources("grn_scale/config"), ROOT / "grn_scale/errors.py",
                          ROOT / "grn_scale/parallel/dims.py"]
             for found in imports(path) if found.module.split(".")[0] not in legal]
    assert wrong == []


def test_command_line_configuration_and_models_of_cost_import_without_torch():
    modules = ["grn_scale.cli", "grn_scale.command_line", "grn_scale.doctor", "grn_scale.parallel.dims",
               *(module_name(path).removesuffix(".__init__") for path in sources(
                   "grn_scale/config", "grn_scale/perf", "grn_scale/planning"))]
    code = "import sys, importlib; sys.modules['torch'] = None\n" + "".join(
        f"importlib.import_module({module!r})\n" for module in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def calls(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_no_pickled_code_and_no_shell_is_ever_run():
    wrong = []
    for path in sources("grn_scale", *PROGRAM_FOLDERS):
        where = path.relative_to(ROOT)
        wrong += [f"{where}:{found.line}: {found.module}" for found in imports(path)
                  if found.module.split(".")[0] in {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}]
        for node, name, keywords in calls(path):
            if name in ("eval", "exec", "os.system", "os.popen") or keywords.get("shell") == "True":
                wrong.append(f"{where}:{node.lineno}: {name}")
            if name == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{where}:{node.lineno}: torch.load without weights_only=True")
            if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code") == "True":
                wrong.append(f"{where}:{node.lineno}: {name} trusts what it loads")
    assert wrong == []


def test_no_handler_swallows_an_error_in_silence():
    wrong = []
    for path in sources("grn_scale", *PROGRAM_FOLDERS):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(line, ast.Pass) for line in node.body)
                broad = node.type is None or ast.unparse(node.type) in ("BaseException", "Exception")
                passed_on = any(isinstance(child, ast.Raise) or (isinstance(child, ast.Name) and child.id == node.name)
                                for line in node.body for child in ast.walk(line))
                if silent or (broad and not passed_on):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_a_file_holds_one_idea():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
               for path in sources("grn_scale", "tests", *PROGRAM_FOLDERS)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE_LINES} == {}
