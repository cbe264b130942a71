"""Conversations and tokens: rendering that only ever appends, and parsing of what was sampled."""
