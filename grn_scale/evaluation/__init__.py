"""How good a trained model is, and how its sampler is best set."""
