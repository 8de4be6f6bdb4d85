"""FP8 in the trainer: delayed scaling, and parameters kept in FP8."""
