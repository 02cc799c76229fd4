"""Backbones: one file for each library of models.

A file here imports ``nn`` and the floors below it, never another file of this folder.
"""
