"""Programs beside the main path. They may use all of grn_scale."""
