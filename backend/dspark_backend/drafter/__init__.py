"""The DSpark drafter: a block of drafts from the target's own features (DSPARK.md, sections 1-3).

Cheng et al. 2026, "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive
Generation"; the parallel backbone is DFlash's (arXiv 2602.06036).
"""
