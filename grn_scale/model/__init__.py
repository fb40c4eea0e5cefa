"""The GRN transformer: mathematics only, no rank, path, print or device literal."""
