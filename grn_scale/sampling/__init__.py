"""The refinement sampler and what decides its steps."""
