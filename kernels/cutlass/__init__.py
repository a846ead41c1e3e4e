"""Grouped matrix products on CUTLASS: sources, their build, and a loader. Importing this builds and loads nothing."""
