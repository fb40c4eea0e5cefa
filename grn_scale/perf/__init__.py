"""FLOPs and measurements."""
