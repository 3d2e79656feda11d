"""Other engines on the same prompts, for ratios within one run."""
