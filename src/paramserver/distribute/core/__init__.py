"""The foundation of every part of a strategy: contexts, values per replica, nested structures, devices."""
