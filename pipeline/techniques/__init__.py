"""How a backbone is adapted to a target, as hooks of the one loop."""
