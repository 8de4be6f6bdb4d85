"""What can be seen wrong with a run before it starts, by subject: the model's folder, data, what judges, the run's directory,
the machine. engine/api/preflight.py asks them all, in the order to mend what they find."""
