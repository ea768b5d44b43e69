"""Shards of unequal length: label-skewed shards of a common data set, and data sets that workers have of their own."""
