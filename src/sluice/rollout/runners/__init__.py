"""Runners: who executes an episode."""
