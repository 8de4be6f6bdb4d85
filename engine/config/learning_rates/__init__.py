"""The learning-rate schedules of a run, one file each: what the optimizer's learning rate is at every step."""
