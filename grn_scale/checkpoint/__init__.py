"""Layout-free checkpoints: chunks of named global tensors, committed atomically."""
