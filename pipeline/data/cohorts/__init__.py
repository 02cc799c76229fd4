"""Definitions of cohorts and labels, one a file: what `prepare cohort --set task=NAME` makes."""
