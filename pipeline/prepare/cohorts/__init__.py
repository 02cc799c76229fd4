"""Clinical tasks: who belongs, the label and the time of prediction, one file for each task."""
