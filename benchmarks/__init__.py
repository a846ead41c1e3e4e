"""Programs that measure: what a call costs (`benchmarks.dispatch`), how fast backends are (`benchmarks.attention`),
how much memory they take (`benchmarks.memory`), and the files of `make bench`."""
