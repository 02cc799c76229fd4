"""Clinical variables: plausible ranges, units and their conversion, MIMIC-III and MIMIC-IV."""
