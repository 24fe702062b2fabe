"""Benchmarks that start clusters of their own."""
