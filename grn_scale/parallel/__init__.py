"""The only place that knows megatron-core and DeepSpeed."""
