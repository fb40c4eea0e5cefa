"""`python -m grn_scale` is `grn-scale`."""

from grn_scale.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
