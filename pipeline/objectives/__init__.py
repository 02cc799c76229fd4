"""What is trained on a backbone, in pretraining and in fine-tuning: one file for each task.

An objective imports ``nn``, ``media``, ``simulation`` and lower layers, never another objective.
"""
