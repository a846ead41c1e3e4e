"""Measuring backends on this machine: shapes, a check of every result, timing in turns, and the session that keeps it."""
