"""grn-scale manifest: make a manifest from other formats, check it before anything is spent on it, see what it holds.

    grn-scale manifest import --from csv clips.csv --output clips.jsonl
    grn-scale manifest validate clips.jsonl
    grn-scale manifest stats clips.jsonl --config configs/runs/demo.yaml --plot clips.png
"""

from __future__ import annotations

import sys

from grn_scale.command_line import choose, run
from grn_scale.data_pipeline import manifest_import, manifest_stats, manifest_validate

ACTIONS = {"import": manifest_import.main, "validate": manifest_validate.main, "stats": manifest_stats.main}


def main(argv: list[str]) -> int:
    """Exit code of the action that argv[0] names."""
    return choose("manifest", argv, ACTIONS, __doc__)


if __name__ == "__main__":
    sys.exit(run(main))
