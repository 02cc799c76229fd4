"""What a user would pick instead of a network, one file each (`pipeline.core.contracts`)."""
