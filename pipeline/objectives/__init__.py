"""Kinds of task, for pretraining and for targets alike, one file each."""
