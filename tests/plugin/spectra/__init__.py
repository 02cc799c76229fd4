"""A plugin for spectra: one component of each kind, in one file each.

A job names it by ``plugins: [path/to/spectra]``; a package that is installed can name it by an
entry point of the group ``onetomany`` instead.
"""
