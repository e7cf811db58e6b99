"""Torture: real workers under random load and random faults, and an account of each task at the end."""
