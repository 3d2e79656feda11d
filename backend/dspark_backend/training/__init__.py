"""Training a drafter: prompts, the target's own answers, objective, trainer, calibration, figures.

Source of the method: DSPARK.md section 4 (Cheng et al. 2026; the DeepSpec repository's recipe).
"""
