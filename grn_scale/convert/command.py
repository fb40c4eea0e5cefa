"""grn-scale convert: weights between official files, this project's checkpoints and Hugging Face style folders.

    grn-scale convert --input GRN_T2V_2B.pth --from official --layout v1 --to native --output ckpt/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.load import parse_yaml, shipped_file
from grn_scale.errors import ConfigError

if TYPE_CHECKING:
    from grn_scale.convert.convert import Request
    from grn_scale.convert.many import Line

FORMS = ("official", "native", "hf")


def main(argv: list[str]) -> int:
    """Run `grn-scale convert` with its arguments; the exit code."""
    if any(argument.partition("=")[0] == "--list" for argument in argv):
        return _many(argv)
    options = command_parser().parse_options(argv)
    start_logging()
    from grn_scale.convert.convert import convert

    written = convert(_request(options))
    print(json.dumps(written, indent=1) if options.json else _table(written))
    return 0


def _many(argv: list[str]) -> int:
    options = list_parser().parse_options(argv)
    start_logging()
    from grn_scale.convert.many import convert_listed

    summary = convert_listed(Path(options.list), conversions(options.list))
    print(json.dumps(summary, indent=1) if options.json else
          f"{summary['conversions']} conversions are done, {summary['made_here']} of them by this process")
    return 0


def conversions(name: str) -> list[Line]:
    """The conversions of a --list file; ConfigError naming the line that makes no sense."""
    from grn_scale.convert.many import read_list

    return read_list(Path(name), lambda words: _request(command_parser().parse_options(words)))


def _request(options: argparse.Namespace) -> Request:
    from grn_scale.convert.convert import Request

    return Request(
        input=Path(options.input), source=options.source, target=options.target, output=Path(options.output),
        layout=options.layout, weights=options.weights, model=_model_values(options.model), dtype=options.dtype,
        allow_missing=options.allow_missing, tokenizer=options.tokenizer and Path(options.tokenizer),
        text_encoder=options.text_encoder and Path(options.text_encoder))


def list_parser() -> CommandParser:
    """Parser of the arguments with --list."""
    parser = CommandParser(
        "convert", "Do the conversions of a file, one a line as they would stand behind `grn-scale convert`. Any "
        "number of processes share the work; an output that is there is left as it is.",
        "grn-scale convert --list conversions.txt", configured=False, json=True)
    parser.add_argument("--list", required=True, metavar="FILE")
    return parser


def command_parser() -> CommandParser:
    """Parser of the command's arguments."""
    parser = CommandParser(
        "convert", "Convert weights: GRN text/video and class-to-image models, video tokenizers, umT5 encoders. Every "
        "value and dtype is kept unless --dtype says otherwise. `--list FILE` alone does one conversion for each line.",
        "grn-scale convert --input GRN_T2V_2B.pth --from official --to native --output ckpt/",
        configured=False, json=True)
    parser.add_argument("--input", required=True, metavar="PATH", help="file or folder of weights")
    parser.add_argument("--from", required=True, choices=FORMS, dest="source", help="form of the input")
    parser.add_argument("--to", required=True, choices=FORMS, dest="target", help="form of the output")
    parser.add_argument("--output", required=True, metavar="PATH", help="file or folder that does not exist yet")
    parser.add_argument("--layout", choices=("v1", "v2"),
                        help="layout the weights were trained with, where neither file name nor input tells")
    parser.add_argument("--weights", choices=("ema", "raw", "both"),
                        help="which weights of a file that holds several (default: all that the target can hold, else "
                        "the moving average); both writes a training file with --to official")
    parser.add_argument("--model", metavar="FILE.yaml",
                        help="model configuration, where the shapes do not tell (label form, rounds, latent channels)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"),
                        help="convert the values (default: keep every dtype)")
    parser.add_argument("--allow-missing", action="store_true", help="name missing tensors and go on without them")
    parser.add_argument("--tokenizer", metavar="PATH", help="with --to hf: video tokenizer of a whole pipeline")
    parser.add_argument("--text-encoder", metavar="PATH", help="with --to hf: umT5 encoder of a whole pipeline")
    return parser


def _model_values(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name)
    if not path.exists() and path.parts[:1] == ("configs",):
        path = shipped_file(str(Path(*path.parts[1:])))
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--model: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--model: {path} must hold keys of a model configuration and their values")
    return values


def _table(written: dict[str, Any]) -> str:
    rows = [("output", written["output"]), ("kind", written["kind"]), ("weights", ", ".join(written["weights"])),
            ("tensors", f"{written['tensors']} ({', '.join(written['dtypes'])})"),
            ("parameters", f"{written['parameters']:,}"), ("bytes", f"{written['bytes']:,}"),
            *((f"model.{name}", value) for name, value in written["model"].items())]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(run(main))
