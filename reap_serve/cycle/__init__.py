"""The loop as a job: windows of statistics -> drift -> plan -> mask -> checkpoint -> comparison -> a decision."""
