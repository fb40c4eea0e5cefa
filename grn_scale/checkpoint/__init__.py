"""Layout-free checkpoints: chunks of named global tensors, committed atomically.

chunks.py boxes | store.py chunk folders through torch.distributed.checkpoint | layout.py step folders |
checkpoint.py save, load, resume | staging.py and background.py saves beside training | weights.py weights by official
name
"""

from grn_scale.checkpoint.weights import load_model_config, load_weights

__all__ = ["load_model_config", "load_weights"]
