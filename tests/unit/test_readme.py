"""What the README and the help tell people to type exists: commands, configuration keys, files of the repository."""

import re
import shlex
from pathlib import Path

import pytest

from grn_scale.cli import COMMANDS, find_command
from grn_scale.command_line import dotted_keys
from grn_scale.config import Config
from grn_scale.config.support import support_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = sorted({line.strip() for line in README.splitlines() if line.startswith("    ") and "grn" in line
                and re.match(r"\s+(grn-scale|torchrun) ", line)} | {command.example for command in COMMANDS})


@pytest.mark.parametrize("line", LINES)
def test_command_line_shown_to_people_is_a_real_one(line):
    words = shlex.split(line.replace("-m grn_scale", "grn-scale"))
    words = words[words.index("grn-scale") + 1:]
    find_command(words[0])
    keys = dotted_keys(Config)
    for word in words[1:]:
        key, equals, _ = word.partition("=")
        if equals and not key.startswith("-") and words[0] != "train-tokenizer":
            assert key in keys, f"{key} is no configuration key"
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


@pytest.mark.parametrize("name", sorted(set(re.findall(
    r"`((?:grn_scale|pretrain|data_pipeline|configs|tests|docs)/[\w./-]*)`", README))))
def test_file_that_the_readme_names_exists(name):
    assert (ROOT / name).exists()


def test_the_table_of_layouts_is_what_the_rules_say():
    begin = "<!-- made by: python -m grn_scale.config.support -->\n"
    table = README[README.index(begin) + len(begin):README.index("\n<!-- end -->")]
    assert table == support_table(), "put the output of `python -m grn_scale.config.support` there"
