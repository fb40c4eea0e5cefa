"""What all commands share: arguments over the configuration, the log on stderr, errors as exit codes.

A command reads:

    def main(argv: list[str]) -> int:
        parser = CommandParser("train", "Pretrain on token shards.", "grn-scale train --config FILE output=DIR")
        parser.add_argument("--resume", default="none")
        config, options = parser.parse_command(argv)
        start_logging()
        save_config(config, Path(config.output))
        ...

    if __name__ == "__main__":
        raise SystemExit(run(main))
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from grn_scale.atomic import write_bytes
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError

SAY_SECONDS = 3.0
"""Time for another process to say why all end."""
EXIT_INTERRUPTED = 130
"""What shells report for a process that SIGINT ended."""
EXIT_PIPE = 141
"""What shells report for a process that SIGPIPE ended."""
_CORRECT = "correct the path"
_RIGHTS = "give another path, or give this user the right to read and write there"
_SPACE = "free space, then run the same command again"
_BROKEN = "the file system or its server fails: see to it, then run the same command again"
_OPEN_FILES = "raise the limit of open files (ulimit -n)"
_REMEDIES = {errno.ENOENT: _CORRECT, errno.ENOTDIR: _CORRECT, errno.EISDIR: _CORRECT, errno.ENAMETOOLONG: _CORRECT,
             errno.ELOOP: _CORRECT, errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS,
             errno.EROFS: "give a path on another file system",
             errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: _SPACE, errno.EIO: _BROKEN, errno.ESTALE: _BROKEN,
             errno.ETIMEDOUT: _BROKEN, errno.ENOTCONN: _BROKEN, errno.EMFILE: _OPEN_FILES, errno.ENFILE: _OPEN_FILES}


def run(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Exit code of `main(argv)`; a UserError becomes one message on stderr, a defect keeps its traceback.

    So does an OSError about a file, with exit code 1. In Python's development mode (PYTHONDEVMODE=1) it has both.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # All processes refuse a configuration alike: one of each node says so, before launchers end it for another.
        if isinstance(error, ConfigError) and int(os.environ.get("LOCAL_RANK", "0")):
            time.sleep(SAY_SECONDS)
        else:
            print(f"{_rank_prefix()}error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        message = os_error_message(error)
        if message is None:
            raise
        if sys.flags.dev_mode:
            traceback.print_exception(error)
        print(f"{_rank_prefix()}error: {message}", file=sys.stderr, flush=True)
        return EXIT_FAILED


def os_error_message(error: OSError) -> str | None:
    """Which file, what is wrong with it, and the remedy; None where no file is concerned, which is a defect."""
    if error.errno is None:
        # Raised in the place of a client's own error, as storage.py does; any other one is a defect.
        return str(error) if error.__cause__ is not None else None
    if error.filename is None and error.errno not in _REMEDIES:
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return f"{place}{error.strerror}{remedy}"


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _rank_prefix() -> str:
    return f"[rank {_rank()}] " if _rank() else ""


def _reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more (head, less); other broken pipes are defects."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def choose(name: str, argv: list[str], commands: Mapping[str, Callable[[list[str]], int]], description: str) -> int:
    """Exit code of the one of a command's subcommands that argv[0] names, run with the rest of argv."""
    usage = f"usage: grn-scale {name} {{{','.join(commands)}}} ...\n\n{description}"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not argv or argv[0] not in commands:
        raise ConfigError(f"grn-scale {name} {argv[0]}: {nearest(argv[0], commands)}" if argv else usage)
    return commands[argv[0]](argv[1:])


def nearest(word: str, valid: Iterable[str]) -> str:
    """Hint for a mistyped word: "did you mean X?", or all that is valid where nothing is near."""
    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"


class _LogFileHandler(logging.StreamHandler):
    """Writes to what is stderr at the time of each message, as rich's handler does."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Nothing: the base class sets what it was made with."""


def start_logging(level: int = logging.INFO) -> None:
    """Send the log to stderr; ranks above 0 report warnings and errors only."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, omit_repeated_times=False,
                              log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{_rank_prefix()}%(message)s"))
    else:  # a log file, where a message stays one line
        handler = _LogFileHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-8s {_rank_prefix()}%(message)s",
                                               "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("grn_scale")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if _rank() == 0 else max(level, logging.WARNING))


def config_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal value."""
    import yaml

    from grn_scale.config.load import to_dict

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def save_config(config: Any, folder: Path) -> Path:
    """Path of `folder`/config.yaml, which now holds the resolved configuration; the log shows it too."""
    text = config_yaml(config)
    logging.getLogger("grn_scale").info("resolved configuration:\n%s", text)
    path = folder / "config.yaml"
    write_bytes(path, text.encode())
    return path


def dotted_keys(schema: type) -> dict[str, Any]:
    """Dotted name -> annotated type of every leaf field of a dataclass schema."""
    from grn_scale.config.load import key_types

    keys: dict[str, Any] = {}
    for name, kind in key_types(schema).items():
        if dataclasses.is_dataclass(kind):
            keys.update({f"{name}.{key}": leaf for key, leaf in dotted_keys(kind).items()})
        else:
            keys[name] = kind
    return keys


class CommandParser(argparse.ArgumentParser):
    """Arguments of one command: its own options, and where it is `configured`, the configuration on top.

    schema: dataclass that --config and overrides are read into, or several, of which the keys given choose one
    (`load_config`); None for the `Config` of all commands.
    Bad usage raises ConfigError.
    """

    def __init__(self, name: str, description: str, example: str, *, configured: bool = True,
                 schema: type | tuple[type, ...] | None = None, json: bool = False) -> None:
        super().__init__(prog=f"grn-scale {name}", description=description, epilog=f"example:\n  {example}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.configured = configured
        self.schema = schema
        if configured:
            self.add_argument("--config", metavar="FILE", help="YAML run file; without it the defaults hold")
            self.add_argument("overrides", nargs="*", metavar="key.sub=value",
                              help="a configuration value, also written as --key.sub value; later ones win")
        if json:
            self.add_argument("--json", action="store_true", help="print the result as JSON")

    @property
    def long_options(self) -> list[str]:
        """Its own, not the keys of the configuration."""
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\nsee `{self.prog} --help`")

    def parse_options(self, argv: list[str]) -> argparse.Namespace:
        """Options of a command without configuration."""
        self._refuse_unknown(argv, {})
        return self.parse_args(argv)

    def parse_command(self, argv: list[str]) -> tuple[Any, argparse.Namespace]:
        """The configuration (an instance of `schema`) and the command's own options."""
        from grn_scale.config.load import load_config
        from grn_scale.config.schema import Config

        options = self.parse_unresolved(argv)
        return load_config(options.config, options.overrides, self.schema or Config), options

    def parse_unresolved(self, argv: list[str]) -> argparse.Namespace:
        """The options, with `config` and `overrides` as they were given: a checkpoint is to say what they apply to."""
        return self.parse_intermixed_args(self._fold_overrides(argv, self._keys()))

    def own_arguments(self, argv: list[str]) -> list[str]:
        """What `argv` holds beside --config and values of the configuration."""
        options = self.parse_unresolved(argv)
        rest, own = self._fold_overrides(argv, self._keys()), []
        while rest:
            argument = rest.pop(0)
            if argument == "--config":
                rest.pop(0)
            elif not argument.startswith("--config=") and argument not in options.overrides:
                own.append(argument)
        return own

    def _keys(self) -> dict[str, Any]:
        """Dotted name -> type of every key that any of the schemas has."""
        from grn_scale.config.schema import Config

        schema = self.schema or Config
        keys: dict[str, Any] = {}
        for each in schema if isinstance(schema, tuple) else (schema,):
            keys |= dotted_keys(each)
        return keys

    def _fold_overrides(self, argv: list[str], keys: dict[str, Any]) -> list[str]:
        """`argv` with each `--key value` and `--key=value` of the configuration written as `key=value`."""
        self._refuse_unknown(argv, keys)
        folded, rest = [], list(argv)
        while rest:
            argument = rest.pop(0)
            name, equals, value = argument.removeprefix("--").partition("=")
            if argument.startswith("--") and not self._knows(argument) and name in keys:
                if not equals:
                    if not rest:
                        raise ConfigError(f"--{name} needs a value: --{name} VALUE or {name}=VALUE")
                    value = rest.pop(0)
                folded.append(f"{name}={value}")
            else:
                folded.append(argument)
        return folded

    def _knows(self, argument: str) -> bool:
        return argument.partition("=")[0] in self._option_string_actions

    def _refuse_unknown(self, argv: list[str], keys: dict[str, Any]) -> None:
        for argument in argv:
            if argument == "--":
                return
            option = argument.partition("=")[0]
            if not argument.startswith("--") or self._knows(argument) or option[2:] in keys:
                continue
            near = difflib.get_close_matches(option, [*self.long_options, *(f"--{key}" for key in keys)], n=1,
                                             cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(self.long_options)}"
            raise ConfigError(f"unknown option {option}; {hint}")
