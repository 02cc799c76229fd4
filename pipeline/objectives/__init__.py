"""What is trained on a backbone, in pretraining and in fine-tuning: one file for each task.

An objective imports ``nn``, ``media``, ``simulation`` and the floors below them, never another
objective.
"""
