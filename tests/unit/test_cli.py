"""The command line: what is printed where, and with which exit code a program ends."""

import argparse
import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grn_scale import __version__, cli
from grn_scale.cli import COMMANDS, main
from grn_scale.command_line import (
    CommandParser,
    choose,
    config_yaml,
    os_error_message,
    run,
    save_config,
    start_logging,
)
from grn_scale.config import Config, load_config
from grn_scale.errors import ConfigError, DoNotRequeue, UserError

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          **options)


def test_help_shows_every_command_with_an_example(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command.summary in text and f"$ {command.example}" in text
        assert command.example.startswith(f"grn-scale {command.name}")


def test_help_and_version_import_nothing_heavy():
    code = ("import sys; from grn_scale.cli import main; main(['--help']); main(['--version']); "
            "print(sorted({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))")
    done = start("-c", code)
    assert done.stdout.splitlines()[-2:] == [__version__, "[]"]


def test_unknown_command_names_the_nearest_and_ends_with_2(capsys):
    assert main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: unknown command 'trian'; did you mean train?\n" and captured.out == ""
    assert main([]) == 2
    assert "usage: grn-scale COMMAND" in capsys.readouterr().err


@pytest.fixture(scope="module")
def helps():
    """Exit code and text of `grn-scale NAME --help` by name, all from one process, since their imports are slow."""
    code = """
import contextlib, io, json
from grn_scale.cli import COMMANDS, main
answers = {}
for command in COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            answer = main([command.name, "--help"])
        except (SystemExit, ImportError) as error:
            answer = error.code if isinstance(error, SystemExit) else str(error)
    answers[command.name] = answer, text.getvalue()
print(json.dumps(answers))
"""
    return json.loads(start("-c", code).stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_command_exists_and_explains_itself(name, helps):
    code, text = helps[name]
    assert code == 0, code
    assert f"usage: grn-scale {name}" in text


@pytest.mark.parametrize("script", ["data_pipeline/manifest.py", "pretrain/train.py"])
def test_script_is_a_program_of_its_own(script):
    done = start(script, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_no_script_hides_a_module_of_the_standard_library():
    """`python FOLDER/NAME.py` puts FOLDER first on the import path, before the standard library."""
    hidden = [f"{folder}/{path.name}" for folder in ("data_pipeline", "pretrain", "tools", "slurm")
              for path in (ROOT / folder).glob("*.py") if path.stem in sys.stdlib_module_names]
    assert hidden == []


@pytest.mark.parametrize(("error", "code"), [(UserError("a"), 1), (ConfigError("a"), 2), (DoNotRequeue("a"), 78)])
def test_error_for_people_is_one_message_and_its_exit_code(error, code, capsys):
    def program(argv):
        raise error

    assert run(program, []) == code
    assert capsys.readouterr() == ("", "error: a\n")


def test_error_of_a_higher_rank_says_which(monkeypatch, capsys):
    def program(argv):
        raise UserError("a")

    monkeypatch.setenv("RANK", "3")
    assert run(program, []) == 1
    assert capsys.readouterr().err == "[rank 3] error: a\n"


def test_what_all_processes_refuse_alike_is_said_once_a_node(monkeypatch, capsys):
    def program(argv):
        raise ConfigError("a")

    monkeypatch.setattr("grn_scale.command_line.SAY_SECONDS", 0.0)
    for local_rank, said in (("0", "[rank 8] error: a\n"), ("1", "")):
        monkeypatch.setenv("RANK", "8")
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert run(program, []) == 2
        assert capsys.readouterr().err == said


def test_interrupt_ends_with_130_and_a_defect_keeps_its_traceback():
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run(interrupted, []) == 130
    done = start("-c", "from grn_scale.command_line import run\nrun(lambda argv: 1 // 0, [])")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_reader_that_stops_early_is_no_error_but_another_broken_pipe_is():
    code = ("import sys\nfrom grn_scale.command_line import run\n"
            "def program(argv):\n    for _ in range(100000): print('x' * 100)\n    return 0\n"
            "code = run(program, [])\nprint(code, file=sys.stderr)")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"141\n"
    child.wait(timeout=60)
    done = start("-c", "from grn_scale.command_line import run\ndef p(a): raise BrokenPipeError\nrun(p, [])")
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(("error", "message"), [
    (PermissionError(errno.EACCES, "Permission denied", "/data/out"),
     "/data/out: Permission denied; give another path, or give this user the right to read and write there"),
    (OSError(errno.EROFS, "Read-only file system", b"/mnt/out"),
     "/mnt/out: Read-only file system; give a path on another file system"),
    (OSError(errno.ENOSPC, "No space left on device"),
     "No space left on device; free space, then run the same command again"),
    (OSError(errno.ENOTEMPTY, "Directory not empty", "/data/out"), "/data/out: Directory not empty"),
])
def test_an_error_about_a_file_is_one_message_that_names_it(error, message, capsys):
    def program(argv):
        raise error

    assert run(program, []) == 1
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_an_error_of_a_storage_client_is_one_message():
    assert os_error_message(OSError("of nobody")) is None
    try:
        raise OSError("cannot read s3://bucket/a: ClientError('no')") from KeyError("no")
    except OSError as error:
        assert os_error_message(error) == "cannot read s3://bucket/a: ClientError('no')"


@pytest.mark.parametrize("error", ["OSError(9, 'Bad file descriptor')", "ConnectionRefusedError(111, 'refused')"])
def test_an_error_of_the_system_about_no_file_keeps_its_traceback(error):
    done = start("-c", f"from grn_scale.command_line import run\ndef p(a): raise {error}\nrun(p, [])")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_development_mode_shows_where_an_error_about_a_file_rose():
    code = "import sys\nfrom grn_scale.command_line import run\nsys.exit(run(lambda argv: open('/proc/nope'), []))"
    for mode in ("", "1"):
        done = start("-c", code, env={**os.environ, "PYTHONDEVMODE": mode})
        assert done.returncode == 1 and ("Traceback" in done.stderr) == bool(mode)
        assert done.stderr.endswith("error: /proc/nope: No such file or directory; correct the path\n")


def parser():
    made = CommandParser("train", "Train.", "grn-scale train output=runs/a", json=True)
    made.add_argument("--resume", default="none")
    return made


def test_overrides_may_be_written_in_both_forms_and_anywhere():
    config, options = parser().parse_command(
        ["seed=3", "--resume", "auto", "--train.steps", "7", "output=a=b", "--model.num_layers=4", "--json"])
    assert (config.seed, config.train.steps, config.output, config.model.num_layers) == (3, 7, "a=b", 4)
    assert (options.resume, options.json) == ("auto", True)


def test_run_file_is_read_below_the_overrides(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 5\ntrain: {steps: 9}\n")
    config, _ = parser().parse_command(["--config", str(tmp_path / "run.yaml"), "train.steps=10"])
    assert (config.seed, config.train.steps) == (5, 10)


@pytest.mark.parametrize(("argv", "words"), [
    (["--resum", "auto"], "unknown option --resum; did you mean --resume?"),
    (["--train.step", "3"], "unknown option --train.step; did you mean --train.steps?"),
    (["--train.steps"], "--train.steps needs a value"),
    (["train.step=3"], "did you mean train.steps?"),
    (["tokens/"], "must have the form key.sub=value"),
    (["--config"], "expected one argument"),
    (["--qqqqqqqq"], "options are --help, --config, --json, --resume"),
])
def test_bad_usage_is_a_configuration_error_with_a_hint(argv, words):
    with pytest.raises(ConfigError) as caught:
        parser().parse_command(argv)
    assert words in str(caught.value)


def test_command_without_configuration_takes_its_own_options_only():
    made = CommandParser("verify", "Verify.", "grn-scale verify tokens/", configured=False)
    made.add_argument("dataset")
    assert made.parse_options(["tokens/"]) == argparse.Namespace(dataset="tokens/")
    with pytest.raises(ConfigError, match="unknown option --seed"):
        made.parse_options(["tokens/", "--seed", "1"])


def test_subcommand_is_chosen_by_name(capsys):
    commands = {"validate": lambda argv: len(argv), "stats": lambda argv: 0}
    assert choose("manifest", ["validate", "a", "b"], commands, "Look at a manifest.") == 2
    assert choose("manifest", ["--help"], commands, "Look at a manifest.") == 0
    assert "grn-scale manifest {validate,stats}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean validate?"):
        choose("manifest", ["valdate"], commands, "Look at a manifest.")


def test_saved_configuration_loads_back_equal(tmp_path):
    config = load_config(None, ["seed=3", "optimizer.betas=[0.9, 0.95]"])
    path = save_config(config, tmp_path)
    assert load_config(path) == config
    assert path.read_text() == config_yaml(config) and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert load_config(None) == Config()


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("3", False)])
def test_log_goes_to_stderr_and_only_rank_0_tells_progress(rank, shown):
    code = ("import logging\nfrom grn_scale.command_line import start_logging\nstart_logging()\n"
            "logging.getLogger('grn_scale.x').info('progress')\nlogging.getLogger('grn_scale.x').warning('trouble')")
    done = start("-c", code, env={**os.environ, "RANK": rank})
    assert done.stdout == "" and "trouble" in done.stderr and ("progress" in done.stderr) == shown


def test_starting_the_log_twice_does_not_double_it():
    logger = logging.getLogger("grn_scale")
    before, propagate, level = logger.handlers[:], logger.propagate, logger.level
    try:
        start_logging()
        start_logging()
        assert len(logger.handlers) == 1
    finally:
        logger.handlers[:], logger.propagate = before, propagate
        logger.setLevel(level)


def test_dispatch_passes_the_rest_of_the_arguments(monkeypatch, tmp_path):
    (tmp_path / "made_up_program.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("count", "made_up_program", "count", "grn-scale count a"),))
    assert main(["count", "a", "b", "c"]) == 3
