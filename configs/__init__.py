"""Configuration files that ship with the package; `grn_scale.config.load.shipped_file` finds them."""
