"""The tiers: each file makes the cases of one."""
