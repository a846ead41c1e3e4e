"""How a backend is chosen: device, spec, capability, registry, selector, settings, plans. Knows no operation."""
