"""What is drafted, by whom, and how much of it is verified (DSPARK.md, sections 1, 5 and 6)."""
