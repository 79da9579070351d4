"""Whether a run folder holds what its records say, and whether the records are what the networks say."""
