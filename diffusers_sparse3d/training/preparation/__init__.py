"""Data preparation: meshes to a dataset of sparse SDFs, occupancies and conditioning images.

`command` has the command line. Nothing is imported here: worker processes need the preparation of one mesh alone.
"""
