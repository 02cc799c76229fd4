"""Backbones: one file for each library of models.

A file here imports ``nn`` and lower layers, never another file of this folder.
"""
