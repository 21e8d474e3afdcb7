"""Triton kernels of the group normalisation, each with its launcher. They need the package triton.

One pass over the features makes statistics, one applies them. The rows of each sample are cut into parts; a program
goes through a part and keeps, per channel, the mean and the sum of squared deviations, tile after tile (sums of
squares would lose the variance of values far from zero). A small kernel joins parts and channels. Nothing is added by
atomics, and no sample is looped over on the host.
"""
