"""A running cluster, its processes killed and stopped while the tokens it sends are checked."""
