"""Settings of a dataset and a machine, as a config overlay that every bundle takes."""
