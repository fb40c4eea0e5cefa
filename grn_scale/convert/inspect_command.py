"""grn-scale inspect: what a file or folder of weights holds, or how two of them differ. Nothing in them is run.

    grn-scale inspect GRN_T2V_2B.pth
    grn-scale inspect --diff a.pth runs/first
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run `grn-scale inspect` with its arguments; the exit code. A difference found is no failure."""
    parser = CommandParser(
        "inspect", "Show kind, step, tensors, parameter count and fingerprint of a .pth, .ckpt or .safetensors file, a "
        "checkpoint, a run folder or a Hugging Face style folder; or the differences of two.",
        "grn-scale inspect GRN_T2V_2B.pth", configured=False, json=True)
    parser.add_argument("file", nargs="?", metavar="FILE", help="file or folder of weights")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two: names, shapes, dtypes, values")
    options = parser.parse_options(argv)
    if (options.file is None) == (options.diff is None):
        raise ConfigError(f"give one FILE, or --diff A B\nsee `{parser.prog} --help`")
    start_logging()
    from grn_scale.convert.compare import describe, differences
    from grn_scale.convert.contents import open_contents

    if options.diff:
        result = differences(*map(open_contents, options.diff))
        lines = _difference_lines(result)
    else:
        result = describe(open_contents(options.file))
        lines = _lines(result)
    # JSON has no infinity: an infinite difference is written as text.
    print(json.dumps(_finite(result), indent=1, allow_nan=False) if options.json else "\n".join(lines))
    return 0


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"path         {result['path']}"
    yield f"kind         {result['kind'] or 'unknown'} ({result['form']})"
    yield f"step         {'unknown' if result['step'] is None else result['step']}"
    for name, value in (result["model"] or {}).items():
        yield f"model.{name:<20}{value}"
    for name, weights in result["weights"].items():
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in weights["dtypes"].items())
        yield ""
        yield f"weights      {name}"
        yield f"tensors      {len(weights['tensors'])}"
        yield f"parameters   {weights['parameters']:,} ({dtypes})"
        yield f"bytes        {weights['bytes']:,}"
        yield f"fingerprint  {weights['fingerprint']}"
        width = max(map(len, weights["tensors"]))
        for tensor, value in weights["tensors"].items():
            yield f"  {tensor:<{width}}  {value['dtype']:<9}{value['shape']}"


def _difference_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"A  {result['a']} ({result['kinds'][0] or 'unknown'}, step {result['steps'][0]})"
    yield f"B  {result['b']} ({result['kinds'][1] or 'unknown'}, step {result['steps'][1]})"
    yield "identical: every name, dtype, shape and bit" if result["identical"] else "they differ"
    for name, found in result["weights"].items():
        yield ""
        yield f"weights {name}: {found['equal']} tensors are equal"
        for side in ("a", "b"):
            yield from (f"  only in {side.upper()}  {tensor}" for tensor in found[f"only_{side}"])
        yield from (f"  shape      {tensor}: {a} and {b}" for tensor, (a, b) in found["shapes"].items())
        yield from (f"  dtype      {tensor}: {a} and {b}" for tensor, (a, b) in found["dtypes"].items())
        yield from (f"  values     {tensor}: " + ("NaN in one" if distance is None else f"at most {distance:.6g} apart")
                    for tensor, distance in found["values"].items())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return "infinity" if value == float("inf") else value


if __name__ == "__main__":
    sys.exit(run(main))
