"""Clinical variables: plausible ranges, units and their conversion, the stays of MIMIC-III."""
