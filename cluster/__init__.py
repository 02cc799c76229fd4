"""Jobs on a Ray cluster: `onetomany submit`, a cluster of N nodes on one machine, manifests for
real ones.
"""
