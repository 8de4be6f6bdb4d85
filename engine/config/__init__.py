"""What a run is asked to be: options and rules, files and overrides, the regime as arithmetic, where processes stand."""
