"""Measuring backends on this machine: shapes, a check of every result, timing in turns, what is kept."""
