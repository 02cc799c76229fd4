"""Programs that collect runs of experiments, one file each (`pipeline.core.contracts.tracker`)."""
