"""The command `grn-scale`: finds the program of a command and runs it, importing nothing else.

Every program is a module with `main(argv) -> exit code`, and can also be run by itself.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from grn_scale import __version__
from grn_scale.command_line import nearest, run
from grn_scale.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """One line of the help, and the module whose `main` does the work."""

    name: str
    module: str
    summary: str
    example: str


COMMANDS = (
    Command("doctor", "grn_scale.doctor", "say what is installed, what is missing and how to get it",
            "grn-scale doctor"),
    Command("demo", "grn_scale.demo.run", "run the whole job on clips it makes itself, on a CPU",
            "grn-scale demo"),
    Command("manifest", "grn_scale.data_pipeline.manifest", "import, check or count a manifest",
            "grn-scale manifest validate clips.jsonl"),
    Command("tokenize", "grn_scale.data_pipeline.tokenize_clips", "turn clips and captions into token shards",
            "grn-scale tokenize --config configs/runs/demo.yaml text.encoder=encoder/ data.manifest=clips.jsonl "
            "output=tokens/"),
    Command("index", "grn_scale.data_pipeline.index", "plan, build, repair, merge or clean up the index of datasets",
            "grn-scale index plan --dataset tokens/ --config configs/runs/demo.yaml"),
    Command("verify", "grn_scale.data_pipeline.verify", "check every payload of a dataset against its checksums",
            "grn-scale verify tokens/"),
    Command("plan", "grn_scale.tools.plan", "say what a run will need and how fast it will be, and search its layout",
            "grn-scale plan --config configs/runs/grn_8b.yaml --cluster configs/clusters/bare_h100.yaml --nodes 32 "
            "--search"),
    Command("train", "grn_scale.pretrain.train", "pretrain on token shards (alone, or under torchrun)",
            "grn-scale train --config configs/runs/demo.yaml data.dataset=tokens/ output=runs/first"),
    Command("slurm", "grn_scale.slurm.command", "submit jobs to a Slurm cluster, and look after them",
            "grn-scale slurm train --cluster site.yaml --config configs/runs/demo.yaml data.dataset=tokens/ "
            "output=runs/first --nodes 2 --submit"),
    Command("scaling", "grn_scale.tools.scaling", "measure how runs scale, as Slurm jobs; fit scaling laws",
            "grn-scale scaling generate --config study.yaml output=studies/first"),
    Command("train-tokenizer", "grn_scale.tokenizer.training", "train a video tokenizer",
            "grn-scale train-tokenizer --config configs/tokenizer/small.yaml data.manifest=a.jsonl output=runs/tok"),
    Command("sample", "grn_scale.sampling.command", "sample videos from a checkpoint",
            "grn-scale sample --run runs/first text.encoder=encoder/ --prompt 'a red circle' output=samples/"),
    Command("convert", "grn_scale.convert.command", "convert weights between official, own and Hugging Face forms",
            "grn-scale convert --input GRN_T2V_2B.pth --from official --to native --output ckpt/"),
    Command("inspect", "grn_scale.convert.inspect_command", "say what a file of weights holds, or how two differ",
            "grn-scale inspect GRN_T2V_2B.pth"),
    Command("evaluate", "grn_scale.evaluation.command", "measure a model, samples or the tokenizer, or fit the sampler",
            "grn-scale evaluate --run runs/first --held-out data.dataset=tokens/ output=measured/"),
    Command("bench", "grn_scale.perf.bench", "measure tokenization, shard reading and training, as JSON",
            "grn-scale bench --config configs/runs/demo.yaml"),
)


def help_text() -> str:
    """What `grn-scale --help` prints: every command with one line and an example."""
    lines = ["usage: grn-scale COMMAND [--config FILE] [key.sub=value ...]", "",
             f"grn_scale {__version__}: pretraining of Generative Refinement Networks (GRN) for video.", "",
             "commands:"]
    for command in COMMANDS:
        lines += [f"  {command.name:<17}{command.summary}", f"  {'':<17}  $ {command.example}"]
    lines += ["", "`grn-scale COMMAND --help` shows the options of a command.",
              "exit codes: 0 done, 1 failed, 2 bad usage or configuration, 75 saved and ready to be started again,",
              "            78 failed and would fail again, 79 ended by the watchdog because it hung"]
    return "\n".join(lines)


def find_command(name: str) -> Command:
    """Command called `name`; ConfigError naming the nearest one where there is none."""
    names = [command.name for command in COMMANDS]
    if name in names:
        return COMMANDS[names.index(name)]
    raise ConfigError(f"unknown command {name!r}; {nearest(name, names)}")


def dispatch(argv: list[str]) -> int:
    """Exit code of the command that argv[0] names, run with the rest of argv."""
    if not argv:
        raise ConfigError("no command given\n\n" + help_text())
    if argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = find_command(argv[0])
    return importlib.import_module(command.module).main(argv[1:])


def main(argv: list[str] | None = None) -> int:
    """Exit code of `grn-scale argv...` (of the process's own arguments where argv is None)."""
    return run(dispatch, sys.argv[1:] if argv is None else argv)
