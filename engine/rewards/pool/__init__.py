"""Judging processes that can be killed at a deadline, whatever judges in them."""
