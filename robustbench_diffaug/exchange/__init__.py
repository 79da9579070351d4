"""Results in the formats of other tools: read into a run folder, and written from one."""
