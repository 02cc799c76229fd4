"""Backbones, one file per library or family."""
