"""What a job will need, how fast it will be and how it scales, before it is launched: no torch, no GPU."""
