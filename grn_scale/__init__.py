"""grn_scale: pretraining of Generative Refinement Networks (GRN) for video at scale."""

__version__ = "0.1.0"
