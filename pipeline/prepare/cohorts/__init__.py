"""Clinical tasks: who belongs, the label and the time of prediction, one file for each task.

A task imports ``definition``, ``clinical``, ``engine`` and layers below ``prepare``, never another
task.
"""
