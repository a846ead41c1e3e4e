"""What a user calls: arguments are validated once, described as a spec, and run through a cached plan."""
