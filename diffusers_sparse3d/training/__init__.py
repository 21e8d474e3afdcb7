"""Training, data preparation and evaluation: the library behind the scripts of `training/`."""
